//! What steers a device: its tags, its fleet's tags, and the labels of the services that it runs. They decide which exporters
//! are scraped and how.
//!
//! A device can write its own tags, so they are not trusted: no tag can name another host, and a tag that cannot be understood
//! counts as absent.

use std::borrow::Cow;

use super::exporter::{self, Exporter};
use super::services::Declared;
use crate::balena::device::{Device, Tag, one, tag_value};
use crate::values::{boolean, one_of, scrape_interval, scrape_timeout};

/// `false` leaves the device out.
const SCRAPE: &str = "prometheus.io/scrape";
/// The exporters, in the notation of the option.
pub const EXPORTERS: &str = "prometheus.io/exporters";
/// A single exporter, as Kubernetes' users write it.
const PORT: &str = "prometheus.io/port";
/// The path of the single exporter.
const PATH: &str = "prometheus.io/path";
/// `http` or `https`.
const SCHEME: &str = "prometheus.io/scheme";
/// How often the device is scraped, in Prometheus' own notation, at least 5s.
const INTERVAL: &str = "prometheus.io/interval";
/// How long a scrape may take. It needs an interval.
const TIMEOUT: &str = "prometheus.io/timeout";
/// `false` mutes the alerts of the device.
const ALERT: &str = "prometheus.io/alert";

/// More exporters on one device could be an attempt to flood Prometheus.
const MAX_EXPORTERS: usize = 16;
/// Characters of a value that a warning shows.
const SHOWN_VALUE: usize = 80;

/// A duration as it is written, and in milliseconds.
type Millis<'a> = (&'a str, u64);

/// Where the exporters of a device come from. The first source that has some provides all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// A tag of the device.
    DeviceTag,
    /// A tag of its fleet.
    FleetTag,
    /// Labels of the services that it runs.
    ServiceLabel,
    /// The option.
    #[default]
    Option,
}

impl Origin {
    /// As it is shown to people.
    pub fn as_str(self) -> &'static str {
        match self {
            Origin::DeviceTag => "device tag",
            Origin::FleetTag => "fleet tag",
            Origin::ServiceLabel => "service label",
            Origin::Option => "option",
        }
    }
}

/// What is scraped on a device, and how.
#[derive(Debug)]
pub struct Steering<'a> {
    /// Whether a tag switches the device off.
    pub is_off: bool,
    /// The exporters.
    pub exporters: Vec<Scraped<'a>>,
    /// Where they come from.
    pub origin: Origin,
}

/// An exporter, and how it is scraped.
#[derive(Debug)]
pub struct Scraped<'a> {
    /// The exporter.
    pub exporter: Cow<'a, Exporter>,
    /// The service that declares it.
    pub service: Option<&'a str>,
    /// `http` or `https`; none is the scrape config's.
    pub scheme: Option<&'a str>,
    /// None is the scrape config's.
    pub interval: Option<Millis<'a>>,
    /// None is the scrape config's, or the interval if that is shorter than Prometheus' default of 10 s.
    pub timeout: Option<Millis<'a>>,
}

/// Reads what steers a device. `options` are the exporters of each device without others. What cannot be understood goes to
/// `warnings`, with the name of the tag's owner.
pub fn of<'a>(
    device: &'a Device, declared: Option<&'a Declared>, options: &'a [Exporter], warnings: &mut Vec<String>,
) -> Steering<'a> {
    let mut tags = Tags { device, warnings };
    let is_off = tags.read(SCRAPE, boolean) == Some(false);
    let scheme = tags.read(SCHEME, |text| one_of(text, [("http", "http"), ("https", "https")]));
    let interval = tags.read(INTERVAL, scrape_interval);
    let timeout = tags.read(TIMEOUT, scrape_timeout);
    tags.read(ALERT, boolean); // what is wrong with it is said here; is_muted() gives the value
    let (origin, mut exporters) = exporters(&mut tags, declared, options);
    for scraped in &mut exporters {
        scraped.scheme = scheme.or(scraped.scheme);
        scraped.interval = interval.or(scraped.interval);
        scraped.timeout = timeout.or(scraped.timeout);
        // Prometheus drops a target whose time-out is longer than its interval, and the scrape config's is not known here.
        scraped.timeout = match (scraped.interval, scraped.timeout) {
            (None, _) => None,
            (Some(interval), Some(timeout)) if timeout.1 <= interval.1 => Some(timeout),
            (Some(interval), Some(_)) => Some(interval),
            (Some(interval), None) => Some(interval).filter(|(_, millis)| *millis < 10_000),
        };
    }
    if timeout.is_some() && exporters.iter().any(|scraped| scraped.interval.is_none()) {
        let name = device.display_name();
        tags.warnings.push(format!("tag {TIMEOUT} of {name} needs an interval ({INTERVAL}); it counts as absent"));
    }
    Steering { is_off, exporters, origin }
}

/// Whether a tag mutes the alerts of a device, left out or not.
pub fn is_muted(device: &Device) -> bool {
    Tags { device, warnings: &mut Vec::new() }.read(ALERT, boolean) == Some(false)
}

/// The exporters of the first source that has some.
fn exporters<'a>(
    tags: &mut Tags<'a, '_>, declared: Option<&'a Declared>, options: &'a [Exporter],
) -> (Origin, Vec<Scraped<'a>>) {
    let plain =
        |exporter: Cow<'a, Exporter>| Scraped { exporter, service: None, scheme: None, interval: None, timeout: None };
    let device = tags.device;
    for (owned, is_own) in [(device.tags(), true), (device.fleet_tags(), false)] {
        if let Some(list) = tags.exporters(owned, is_own) {
            let origin = if is_own { Origin::DeviceTag } else { Origin::FleetTag };
            return (origin, list.into_iter().map(|exporter| plain(Cow::Owned(exporter))).collect());
        }
    }
    let declared = declared.map(|declared| &*declared.exporters).unwrap_or_default();
    if !declared.is_empty() {
        let scraped = declared.iter().map(|declared| Scraped {
            exporter: Cow::Borrowed(&declared.exporter),
            service: Some(&declared.service),
            scheme: declared.scheme,
            interval: declared.interval.as_ref().map(|(text, millis)| (text.as_str(), *millis)),
            timeout: declared.timeout.as_ref().map(|(text, millis)| (text.as_str(), *millis)),
        });
        return (Origin::ServiceLabel, scraped.collect());
    }
    (Origin::Option, options.iter().map(|exporter| plain(Cow::Borrowed(exporter))).collect())
}

/// The tags of a device and of its fleet.
struct Tags<'a, 'w> {
    device: &'a Device<'a>,
    warnings: &'w mut Vec<String>,
}

impl<'a> Tags<'a, '_> {
    /// The tag of the device, or else of its fleet. A tag that cannot be understood leaves the decision to the next one.
    fn read<T>(&mut self, key: &str, parse: impl Fn(&'a str) -> Result<T, String>) -> Option<T> {
        let device = self.device;
        let own = self.of(device.tags(), true, key, &parse);
        own.or_else(|| self.of(device.fleet_tags(), false, key, &parse))
    }

    /// The list of exporters of one owner, or else its single exporter.
    fn exporters(&mut self, tags: &'a [Tag], is_own: bool) -> Option<Vec<Exporter>> {
        let list = self.of(tags, is_own, EXPORTERS, &|text| {
            let list = exporter::parse_list(text)?;
            let is_short = list.len() <= MAX_EXPORTERS;
            is_short.then_some(list).ok_or_else(|| format!("names more than {MAX_EXPORTERS} exporters"))
        });
        let path = tag_value(tags, PATH).map(str::trim);
        list.or_else(|| self.of(tags, is_own, PORT, &|text| Ok(vec![exporter::unnamed(text, path)?])))
    }

    /// A tag of one owner.
    fn of<T>(
        &mut self, tags: &'a [Tag], is_own: bool, key: &str, parse: &impl Fn(&'a str) -> Result<T, String>,
    ) -> Option<T> {
        let value = tag_value(tags, key)?;
        let error = match parse(value.trim()) {
            Ok(parsed) => return Some(parsed),
            Err(error) => error.chars().take(200).collect::<String>(), // it may quote all of the value
        };
        let fleet = one(&self.device.fleet).and_then(|fleet| fleet.slug.as_deref());
        let owner = if is_own { self.device.display_name() } else { format!("fleet {}", fleet.unwrap_or("?")) };
        let shown: String = value.chars().take(SHOWN_VALUE).collect();
        self.warnings.push(format!("tag {key} of {owner} is {shown:?}: {error}; it counts as absent"));
        None
    }
}
