//! Tags steer a device, as annotations steer a pod in Kubernetes. A device can write its own tags, so they are not trusted: no
//! tag can name another host, and a tag that cannot be understood counts as absent.

use super::exporter::{self, Exporter};
use crate::balena::device::{Device, one, tag_value};
use crate::values::{boolean, one_of, prometheus_duration};

/// `false` leaves the device out.
const SCRAPE: &str = "prometheus.io/scrape";
/// The exporters of this device, in the notation of the option.
pub const EXPORTERS: &str = "prometheus.io/exporters";
/// `http` or `https`.
const SCHEME: &str = "prometheus.io/scheme";
/// How often this device is scraped, in Prometheus' own notation, at least 5s.
const INTERVAL: &str = "prometheus.io/interval";

/// More exporters on one device could be an attempt to flood Prometheus.
const MAX_EXPORTERS: usize = 16;
/// The shortest interval, in milliseconds.
const MIN_INTERVAL: u64 = 5000;
/// Characters of a value that a warning shows.
const SHOWN_VALUE: usize = 80;

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

/// Reads the tags that steer a device. What cannot be understood goes to `warnings`, with the name of the tag's owner.
pub fn of<'a>(device: &'a Device, warnings: &mut Vec<String>) -> Steering<'a> {
    Steering {
        scrape: read(device, SCRAPE, boolean, warnings),
        exporters: read(device, EXPORTERS, exporters, warnings),
        scheme: read(device, SCHEME, |text| one_of(text, [("http", "http"), ("https", "https")]), warnings),
        interval: read(device, INTERVAL, interval, warnings),
    }
}

/// The tag of the device, or else of its fleet. A tag that cannot be understood leaves the decision to the next one.
fn read<'a, T>(
    device: &'a Device, key: &str, parse: impl Fn(&'a str) -> Result<T, String>, warnings: &mut Vec<String>,
) -> Option<T> {
    for (tags, is_own) in [(device.tags(), true), (device.fleet_tags(), false)] {
        let Some(value) = tag_value(tags, key) else { continue };
        let error = match parse(value.trim()) {
            Ok(parsed) => return Some(parsed),
            Err(error) => error.chars().take(200).collect::<String>(), // it may quote all of the value
        };
        let fleet = one(&device.fleet).and_then(|fleet| fleet.slug.as_deref());
        let owner = if is_own { device.display_name() } else { format!("fleet {}", fleet.unwrap_or("?")) };
        let shown: String = value.chars().take(SHOWN_VALUE).collect();
        warnings.push(format!("tag {key} of {owner} is {shown:?}: {error}; it counts as absent"));
    }
    None
}

fn exporters(text: &str) -> Result<Vec<Exporter>, String> {
    let list = exporter::parse_list(text)?;
    let is_short = list.len() <= MAX_EXPORTERS;
    is_short.then_some(list).ok_or_else(|| format!("names more than {MAX_EXPORTERS} exporters"))
}

fn interval(text: &str) -> Result<(&str, u64), String> {
    match prometheus_duration(text)? {
        (_, ..MIN_INTERVAL) => Err("is shorter than 5s".into()),
        interval => Ok(interval),
    }
}
