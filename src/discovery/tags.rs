//! The tags of a device and of its fleet, and what a device's own tags may change.

use std::borrow::Cow;

use super::exporter::{self, Exporter};
use super::label_prefix::{self, ALERT, Declarations, MAX_EXPORTERS, PREFIX, Unused, wrong};
use crate::balena::Device;
use crate::balena::device::{Tag, up_to};
use crate::values::{BadValue, Millis};
use crate::word_enum::words;

/// `false` leaves the device out.
pub const SCRAPE: &str = "scrape";
/// `http` or `https`.
pub const SCHEME: &str = "scheme";
/// How often the device is scraped, in Prometheus' own notation, at least 5s.
pub const INTERVAL: &str = "interval";
/// How long a scrape may take. It needs an interval.
pub const TIMEOUT: &str = "timeout";
/// When a fleet is switched off on purpose. Of a fleet only: a device must not mute its fleet.
pub const QUIET: &str = "quiet";
/// The exporters, in the notation of the option.
pub const EXPORTERS: &str = "exporters";
/// A single exporter, as Kubernetes' users write it.
const PORT: &str = "port";
const PATH: &str = "path";
/// The tags of a device. Its fleet may have [`QUIET`] as well.
const OF_DEVICE: [&str; 8] = [ALERT, EXPORTERS, INTERVAL, PATH, PORT, SCHEME, SCRAPE, TIMEOUT];
const OF_FLEET: [&str; 9] = [ALERT, EXPORTERS, INTERVAL, PATH, PORT, QUIET, SCHEME, SCRAPE, TIMEOUT];

/// Characters of a key, by the API's own limit.
const MAX_KEY_LENGTH: usize = 100;
/// Prometheus' own interval, in milliseconds, which the stack's configuration has too.
const DEFAULT_INTERVAL: u64 = 60_000;
/// Prometheus' own time-out.
pub const DEFAULT_TIMEOUT: Millis = (Cow::Borrowed("10s"), 10_000);

words! {
    /// What a device's own tags may change. A device can write them, so it is not trusted with everything.
    #[derive(Default)]
    OwnTags {
    /// Fewer exporters, longer intervals and shorter time-outs than its fleet has.
    #[default]
    Narrow = "narrow",
    /// Everything that a tag of its fleet may.
    All = "all",
    Off = "off",
    }
}

/// Why the value of a device's own tag does not narrow the one that it would replace, if it does not.
pub type Widens<T> = fn(&T, Option<&T>) -> Option<&'static str>;

pub fn widens_scrape(own: &bool, fleet: Option<&bool>) -> Option<&'static str> {
    (*own && fleet == Some(&false)).then_some("its fleet is switched off")
}

pub fn changes_scheme(own: &&str, fleet: Option<&&str>) -> Option<&'static str> {
    (own != fleet.unwrap_or(&"http")).then_some("its fleet has the other scheme")
}

pub fn shortens_interval(own: &Millis, fleet: Option<&Millis>) -> Option<&'static str> {
    let least = fleet.map_or(DEFAULT_INTERVAL, |(_, millis)| *millis);
    (own.1 < least).then_some("it is shorter than its fleet's interval, or than 1m where the fleet has none")
}

pub fn lengthens_timeout(own: &Millis, fleet: Option<&Millis>) -> Option<&'static str> {
    let most = fleet.map_or(DEFAULT_TIMEOUT.1, |(_, millis)| *millis);
    (own.1 > most).then_some("it is longer than its fleet's time-out, or than 10s where the fleet has none")
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
    pub device: &'a Device<'a>,
    pub own_tags: OwnTags,
    own: Declarations<'a>,
    fleet: Declarations<'a>,
    /// For what is wrong with a tag.
    pub warnings: &'w mut Vec<String>,
}

impl<'a, 'w> Tags<'a, 'w> {
    /// Reads the tags. Warns of those that are meant for this program and have no effect.
    pub fn new(device: &'a Device<'a>, own_tags: OwnTags, warnings: &'w mut Vec<String>) -> Self {
        let pair = |tag: &'a Tag| Some((tag.key.as_deref()?, tag.value.as_deref().unwrap_or_default()));
        let mut unused = Vec::new();
        let own = label_prefix::read(device.tags().iter().filter_map(pair), &OF_DEVICE, |key, why| {
            unused.push((key, true, why));
        });
        let of_fleet = device.fleet_tags().iter().filter_map(pair);
        let fleet = label_prefix::read(of_fleet, &OF_FLEET, |key, why| {
            unused.push((key, false, why));
        });
        let mut tags = Tags { device, own_tags, own, fleet, warnings };
        for (key, is_own, why) in unused {
            let (owner, known) = if is_own { ("device", OF_DEVICE.join(", ")) } else { ("fleet", OF_FLEET.join(", ")) };
            let why = match why {
                Unused::Unknown => format!("has no effect: a {owner} takes {PREFIX}/ with {known}"),
                Unused::OtherSpelling => "has no effect beside the same one with a dot".into(),
            };
            tags.warn(key, is_own, &why);
        }
        tags
    }

    /// The value of the device's tag, if it is allowed, or else of its fleet's tag. A tag that cannot be understood counts as
    /// absent.
    pub fn read<T: Clone>(
        &mut self, name: &str, parse: impl Fn(&'a str) -> Result<T, BadValue>, widens: Widens<T>,
    ) -> Option<T> {
        let mut read = [None];
        self.set(&mut read, name, parse, |value| value, widens);
        let [read] = read;
        read
    }

    /// Sets a property of each exporter: to the value of the device's tag, if it is allowed, or else of the fleet's tag; without
    /// both it stays. Returns whether there is such a tag.
    pub fn set<S, T: Clone>(
        &mut self, exporters: &mut [S], name: &str, parse: impl Fn(&'a str) -> Result<T, BadValue>,
        property: for<'s> fn(&'s mut S) -> &'s mut Option<T>, widens: Widens<T>,
    ) -> bool {
        let (own, fleet) = (self.of(true, name, &parse), self.of(false, name, &parse));
        for scraped in exporters {
            let property = property(scraped);
            let known = fleet.clone().or_else(|| property.take());
            let why =
                own.as_ref().filter(|_| self.own_tags != OwnTags::All).and_then(|own| widens(own, known.as_ref()));
            if let Some(why) = why {
                self.ignored(name, &why.into(), "it");
            }
            *property = own.clone().filter(|_| why.is_none()).or(known);
        }
        own.or(fleet).is_some()
    }

    /// Warns about a tag of the device whose value, or this part of it, is not allowed.
    pub fn ignored(&mut self, name: &str, why: &BadValue, part: &str) {
        let Some((key, value)) = self.own.get(name) else { return };
        let (device, mode) = (self.device.display_name(), self.own_tags.as_str());
        let warning = format!(
            "tag {}; {part} is ignored, since a device's own tags are not trusted (--own-tags {mode}): tag its fleet, use a \
             service label, or set --own-tags all (OWN_TAGS=all)",
            wrong(&format!("{key} of {device}"), value, why)
        );
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    /// The list of exporters of one owner, or else its single exporter, with the name of the tag that has them.
    pub fn exporters(&mut self, is_own: bool) -> Option<(&'static str, Vec<Exporter>)> {
        let list = self.of(is_own, EXPORTERS, &|text| {
            let list = exporter::parse_list(text)?;
            let is_short = list.len() <= MAX_EXPORTERS;
            is_short.then_some(list).ok_or_else(|| format!("it names more than {MAX_EXPORTERS} exporters").into())
        });
        let tags = if is_own { &self.own } else { &self.fleet };
        let (port, path) = (tags.get(PORT).copied(), tags.get(PATH).copied());
        for (key, _) in [port, path].into_iter().flatten() {
            if list.is_some() {
                self.warn(key, is_own, "has no effect beside the list of exporters");
            } else if port.is_none() {
                self.warn(key, is_own, &format!("has no effect without {PREFIX}/{PORT}"));
            }
        }
        if let Some(list) = list {
            return Some((EXPORTERS, list));
        }
        if let Some((key, _)) = path
            && port.is_some_and(|(_, port)| port.contains('/'))
        {
            self.warn(key, is_own, &format!("has no effect: {PREFIX}/{PORT} has a path"));
        }
        let path = self.of(is_own, PATH, &|text| exporter::path(text));
        let single = self.of(is_own, PORT, &|text| Ok(vec![exporter::with_path(None, text, path)?]))?;
        Some((PORT, single))
    }

    /// The value of a tag of one owner: of the device itself, or else of its fleet.
    pub fn of<T>(&mut self, is_own: bool, name: &str, parse: &impl Fn(&'a str) -> Result<T, BadValue>) -> Option<T> {
        let tags = if is_own { &self.own } else { &self.fleet };
        let (key, value) = *tags.get(name)?;
        if is_own && self.own_tags == OwnTags::Off {
            self.ignored(name, &"the device's own tags are switched off".into(), "it");
            return None;
        }
        let error = match parse(value.trim()) {
            Ok(parsed) => return Some(parsed),
            Err(error) => error,
        };
        let what = wrong(&format!("{key} of {}", self.owner(is_own)), value, &error);
        self.warnings.push(format!("tag {what}; it counts as absent"));
        None
    }

    /// Warns about a tag.
    pub fn warn(&mut self, key: &str, is_own: bool, what: &str) {
        let warning = format!("tag {} of {} {what}", up_to(MAX_KEY_LENGTH, key), self.owner(is_own));
        self.warnings.push(warning);
    }

    /// Whether the device itself has this tag, which counts before its fleet's.
    pub fn is_own(&self, name: &str) -> bool {
        self.own.contains_key(name)
    }

    /// The owner of a tag, as it is shown to people.
    pub fn owner(&self, is_own: bool) -> String {
        let fleet = self.device.fleet.as_ref().and_then(|fleet| fleet.slug.as_deref());
        if is_own { self.device.display_name() } else { format!("fleet {}", fleet.unwrap_or("?")) }
    }
}
