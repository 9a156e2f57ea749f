//! The tags of a device and of its fleet, and what a device's own tags may change.

use super::exporter::{self, Exporter};
use crate::balena::device::{Device, Tag, tag_value};
use crate::values::BadValue;

/// `false` leaves the device out.
pub const SCRAPE: &str = "prometheus.io/scrape";
/// `http` or `https`.
pub const SCHEME: &str = "prometheus.io/scheme";
/// How often the device is scraped, in Prometheus' own notation, at least 5s.
pub const INTERVAL: &str = "prometheus.io/interval";
/// How long a scrape may take. It needs an interval.
pub const TIMEOUT: &str = "prometheus.io/timeout";
/// `false` mutes the alerts of the device.
pub const ALERT: &str = "prometheus.io/alert";
/// When a fleet is switched off on purpose. Of a fleet only: a device must not mute its fleet.
pub const QUIET: &str = "prometheus.io/quiet";
/// The exporters, in the notation of the option.
pub const EXPORTERS: &str = "prometheus.io/exporters";
/// A single exporter, as Kubernetes' users write it.
const PORT: &str = "prometheus.io/port";
/// The path of the single exporter.
const PATH: &str = "prometheus.io/path";

/// More exporters on one device could be an attempt to flood Prometheus.
const MAX_EXPORTERS: usize = 16;
/// Prometheus' own interval, in milliseconds, which the stack's configuration has too.
const DEFAULT_INTERVAL: u64 = 60_000;
/// Prometheus' own time-out, in milliseconds.
pub const DEFAULT_TIMEOUT: u64 = 10_000;
/// Characters of a value that a warning shows.
const SHOWN_VALUE: usize = 80;
/// Characters of what is wrong with it.
const SHOWN_ERROR: usize = 200;

/// A duration as it is written, and in milliseconds.
pub type Millis<'a> = (&'a str, u64);

/// What a device's own tags may change. A device can write them, so it is not trusted with everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OwnTags {
    /// Fewer exporters, longer intervals and shorter time-outs than its fleet has.
    #[default]
    Narrow,
    /// Everything that a tag of its fleet may.
    All,
    /// Nothing.
    Off,
}

impl OwnTags {
    /// The option's value.
    pub fn as_str(self) -> &'static str {
        match self {
            OwnTags::Narrow => "narrow",
            OwnTags::All => "all",
            OwnTags::Off => "off",
        }
    }
}

/// Checks that the value of a device's own tag narrows the value that it would replace. The error says why it does not.
pub type Narrows<T> = fn(T, Option<T>) -> Result<(), &'static str>;

/// `false` narrows everything; `true` does not replace the `false` of a fleet.
pub fn is_narrower_scrape(own: bool, fleet: Option<bool>) -> Result<(), &'static str> {
    if own && fleet == Some(false) { Err("its fleet is switched off") } else { Ok(()) }
}

/// Only the scheme of the fleet is allowed.
pub fn is_same_scheme(own: &str, fleet: Option<&str>) -> Result<(), &'static str> {
    if own == fleet.unwrap_or("http") { Ok(()) } else { Err("its fleet has the other scheme") }
}

/// An interval that is not shorter.
pub fn is_longer_interval(own: Millis, fleet: Option<Millis>) -> Result<(), &'static str> {
    let least = fleet.map_or(DEFAULT_INTERVAL, |(_, millis)| millis);
    if own.1 >= least {
        Ok(())
    } else {
        Err("it is shorter than its fleet's interval, or than 1m where the fleet has none")
    }
}

/// A time-out that is not longer.
pub fn is_shorter_timeout(own: Millis, fleet: Option<Millis>) -> Result<(), &'static str> {
    let most = fleet.map_or(DEFAULT_TIMEOUT, |(_, millis)| millis);
    if own.1 <= most {
        Ok(())
    } else {
        Err("it is longer than its fleet's time-out, or than 10s where the fleet has none")
    }
}

/// Whether an item of a device's own list means this exporter of its fleet. What the item leaves out may be anything.
pub fn selects(item: &Exporter, exporter: &Exporter) -> bool {
    let path = exporter.path.as_deref().unwrap_or("/metrics");
    item.port == exporter.port
        && (item.name.is_none() || item.name == exporter.name)
        && item.path.as_deref().is_none_or(|wanted| wanted == path)
}

/// The tags of a device and of its fleet.
pub struct Tags<'a, 'w> {
    /// The device.
    pub device: &'a Device<'a>,
    /// What its own tags may change.
    pub own_tags: OwnTags,
    /// For what is wrong with a tag.
    pub warnings: &'w mut Vec<String>,
}

impl<'a> Tags<'a, '_> {
    /// The value of the device's tag, if it is allowed, or else of its fleet's tag. A tag that cannot be understood counts as absent.
    pub fn read<T: Copy>(
        &mut self, key: &str, parse: impl Fn(&'a str) -> Result<T, BadValue>, narrows: Narrows<T>,
    ) -> Option<T> {
        let (own, fleet) = self.both(key, &parse);
        own.filter(|own| self.may(key, *own, fleet, narrows)).or(fleet)
    }

    /// Sets a property of each exporter: to the value of the device's tag, if it is allowed, or else of the fleet's tag; without both
    /// it stays. Returns whether there is such a tag.
    pub fn set<S, T: Copy>(
        &mut self, exporters: &mut [S], key: &str, parse: impl Fn(&'a str) -> Result<T, BadValue>,
        property: for<'s> fn(&'s mut S) -> &'s mut Option<T>, narrows: Narrows<T>,
    ) -> bool {
        let (own, fleet) = self.both(key, &parse);
        for scraped in exporters {
            let known = fleet.or(*property(scraped));
            *property(scraped) = own.filter(|own| self.may(key, *own, known, narrows)).or(known);
        }
        own.or(fleet).is_some()
    }

    /// The value of the fleet's tag. The device's own does not count.
    pub fn of_fleet<T>(&mut self, key: &str, parse: impl Fn(&'a str) -> Result<T, BadValue>) -> Option<T> {
        self.of(self.device.fleet_tags(), false, key, &parse)
    }

    fn both<T>(&mut self, key: &str, parse: &impl Fn(&'a str) -> Result<T, BadValue>) -> (Option<T>, Option<T>) {
        let device = self.device;
        (self.of(device.tags(), true, key, parse), self.of(device.fleet_tags(), false, key, parse))
    }

    /// Whether a value of the device's own tag may replace a known one.
    fn may<T>(&mut self, key: &str, own: T, known: Option<T>, narrows: Narrows<T>) -> bool {
        if self.own_tags == OwnTags::All {
            return true;
        }
        narrows(own, known).map_err(|why| self.ignored(key, why)).is_ok()
    }

    /// Warns about a tag of the device whose value is not allowed.
    pub fn ignored(&mut self, key: &str, why: &str) {
        let (name, mode) = (self.device.display_name(), self.own_tags.as_str());
        let why: String = why.chars().take(SHOWN_ERROR).collect();
        let shown: String = tag_value(self.device.tags(), key).unwrap_or_default().chars().take(SHOWN_VALUE).collect();
        let warning = format!(
            "tag {key} of {name} is {shown:?}: {why}; it is ignored, since a device's own tags are not trusted (--own-tags {mode}): \
             tag its fleet, use a service label, or set --own-tags all (OWN_TAGS=all)"
        );
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    /// The list of exporters of one owner, or else its single exporter, with the tag that names them.
    pub fn exporters(&mut self, tags: &'a [Tag], is_own: bool) -> Option<(&'static str, Vec<Exporter>)> {
        let list = self.of(tags, is_own, EXPORTERS, &|text| {
            let list = exporter::parse_list(text)?;
            let is_short = list.len() <= MAX_EXPORTERS;
            is_short.then_some(list).ok_or_else(|| format!("it names more than {MAX_EXPORTERS} exporters").into())
        });
        if let Some(list) = list {
            return Some((EXPORTERS, list));
        }
        let path = tag_value(tags, PATH).map(str::trim);
        let single = self.of(tags, is_own, PORT, &|text| Ok(vec![exporter::unnamed(text, path)?]))?;
        Some((PORT, single))
    }

    /// A tag of one owner.
    fn of<T>(
        &mut self, tags: &'a [Tag], is_own: bool, key: &str, parse: &impl Fn(&'a str) -> Result<T, BadValue>,
    ) -> Option<T> {
        let value = tag_value(tags, key)?;
        if is_own && self.own_tags == OwnTags::Off {
            self.ignored(key, "the device's own tags are switched off");
            return None;
        }
        let error = match parse(value.trim()) {
            Ok(parsed) => return Some(parsed),
            Err(error) => error.to_string().chars().take(SHOWN_ERROR).collect::<String>(), // it may quote all of the value
        };
        let fleet = self.device.fleet.as_ref().and_then(|fleet| fleet.slug.as_deref());
        let owner = if is_own { self.device.display_name() } else { format!("fleet {}", fleet.unwrap_or("?")) };
        let shown: String = value.chars().take(SHOWN_VALUE).collect();
        self.warnings.push(format!("tag {key} of {owner} is {shown:?}: {error}; it counts as absent"));
        None
    }
}
