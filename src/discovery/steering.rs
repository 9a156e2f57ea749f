//! Tags steer a device, as annotations steer a pod in Kubernetes. A device may write its own, so they are
//! not trusted: none of them can name another host, and one that cannot be understood counts as absent.

use crate::balena::device::{Device, Tag, one};
use crate::config::options::{boolean, one_of};
use crate::discovery::exporter::{self, Exporter};

/// `false` leaves the device out.
pub const SCRAPE: &str = "prometheus.io/scrape";
/// The exporters of this device, as the option has them.
pub const EXPORTERS: &str = "prometheus.io/exporters";
/// `http` or `https`.
pub const SCHEME: &str = "prometheus.io/scheme";
/// How often this device is scraped, in Prometheus' own notation, at least 5s.
pub const INTERVAL: &str = "prometheus.io/interval";

/// More exporters than this on one device are taken for an attempt to flood Prometheus.
const MOST_EXPORTERS: usize = 16;
/// Longer than any duration needs to be.
const LONGEST_INTERVAL: usize = 64;

/// What the tags of a device, or else of its fleet, ask for.
#[derive(Debug, Default)]
pub struct Steering<'a> {
    /// Whether to scrape at all.
    pub scrape: Option<bool>,
    /// Instead of the configured ones.
    pub exporters: Option<Vec<Exporter>>,
    /// `http` or `https`.
    pub scheme: Option<&'a str>,
    /// Instead of the scrape config's: the duration as it is written, and in milliseconds.
    pub interval: Option<(&'a str, u64)>,
}

/// Reads the tags that steer; what cannot be understood goes to `warnings`, with its owner's name.
pub fn steer<'a>(device: &'a Device, warnings: &mut Vec<String>) -> Steering<'a> {
    Steering {
        scrape: read(device, SCRAPE, boolean, warnings),
        exporters: read(device, EXPORTERS, exporters, warnings),
        scheme: read(device, SCHEME, |text| one_of(text, [("http", "http"), ("https", "https")]), warnings),
        interval: read(device, INTERVAL, interval, warnings),
    }
}

/// The device's own tag beats its fleet's; one that cannot be understood leaves it to the next in line.
fn read<'a, T>(
    device: &'a Device, key: &str, parse: impl Fn(&'a str) -> Result<T, String>, warnings: &mut Vec<String>,
) -> Option<T> {
    for (tags, is_own) in [(device.tags(), true), (device.fleet_tags(), false)] {
        let Some(value) = value(tags, key) else { continue };
        let error = match parse(value.trim()) {
            Ok(parsed) => return Some(parsed),
            Err(error) => error.chars().take(200).collect::<String>(), // it may quote all of the value
        };
        let fleet = one(&device.fleet).and_then(|fleet| fleet.slug.as_deref());
        let owner = if is_own { device.display_name() } else { format!("fleet {}", fleet.unwrap_or("?")) };
        let shown: String = value.chars().take(80).collect();
        warnings.push(format!("tag {key} of {owner} is {shown:?}: {error}; it counts as absent"));
    }
    None
}

fn exporters(text: &str) -> Result<Vec<Exporter>, String> {
    let list = exporter::parse_list(text)?;
    let few = list.len() <= MOST_EXPORTERS;
    few.then_some(list).ok_or_else(|| format!("names more than {MOST_EXPORTERS} exporters"))
}

/// The value of a tag; null counts as empty.
pub fn value<'a>(tags: &'a [Tag], key: &str) -> Option<&'a str> {
    let named = tags.iter().filter(|tag| tag.key.as_deref() == Some(key));
    named.map(|tag| tag.value.as_deref().unwrap_or_default()).min() // a key that is there twice: in any order the same
}

/// Prometheus' grammar: `1h30m`, units falling, each at most once; humantime's is another one.
fn interval(text: &str) -> Result<(&str, u64), String> {
    const DAY: u64 = 86_400_000;
    const UNITS: [(&str, u64); 7] =
        [("y", 365 * DAY), ("w", 7 * DAY), ("d", DAY), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];
    let bad = || "takes a duration of Prometheus such as 30s or 1m30s".to_owned();
    if text.len() > LONGEST_INTERVAL {
        return Err(bad()); // leading zeros make one of any length
    }
    let (mut rest, mut units, mut millis) = (text, UNITS.iter(), 0_u64);
    while !rest.is_empty() {
        let number;
        (number, rest) = rest.split_at(rest.bytes().take_while(u8::is_ascii_digit).count());
        let unit;
        (unit, rest) = rest.split_at(rest.bytes().take_while(u8::is_ascii_alphabetic).count());
        let (_, length) = units.find(|(name, _)| *name == unit).ok_or_else(bad)?;
        let part = number.parse().ok().and_then(|number: u64| number.checked_mul(*length));
        millis = part.and_then(|part| millis.checked_add(part)).ok_or_else(bad)?;
    }
    match millis {
        _ if text.is_empty() => Err(bad()),
        ..5000 => Err("is shorter than 5s".into()),
        // Prometheus counts nanoseconds in an i64
        _ if millis > i64::MAX as u64 / 1_000_000 => Err(bad()),
        _ => Ok((text, millis)),
    }
}

/// A tag that devices must have, `key` or `key=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagFilter {
    /// Its key.
    pub key: String,
    /// Its value, if that matters.
    pub value: Option<String>,
}

impl TagFilter {
    /// Splits at the first `=`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => (text, None),
        };
        if !(1..=100).contains(&key.chars().count()) || key.contains(char::is_whitespace) {
            return Err(format!("{key:?} is no key: it has 1 to 100 characters and no white space"));
        }
        Ok(TagFilter { key: key.to_owned(), value })
    }

    /// A device's own tag beats its fleet's.
    pub fn matches(&self, device: &Device) -> bool {
        let found = value(device.tags(), &self.key).or_else(|| value(device.fleet_tags(), &self.key));
        found.is_some_and(|found| self.value.as_ref().is_none_or(|wanted| wanted == found))
    }
}
