//! The exporters of a device, and how each is scraped: its tags, its fleet's tags, the labels of the services that it runs, and
//! an option decide.
//!
//! A device can write its own tags, so they are not trusted: they narrow what its fleet has, unless an option lets them do more.
//! No tag can name another host, and a tag that cannot be understood counts as absent.

use super::exporter::Exporter;
use super::label_prefix::PREFIX;
use super::service_labels::Declared;
use super::tags::{self, DEFAULT_TIMEOUT, INTERVAL, OwnTags, SCHEME, SCRAPE, TIMEOUT, Tags};
use crate::values::{boolean, scheme, scrape_interval, scrape_timeout};
use crate::word_enum::words;

words! {
    /// Where the exporters of a device come from. The first source that has some provides all of them.
    #[derive(Default, Hash)]
    Origin {
    DeviceTag = "device tag",
    FleetTag = "fleet tag",
    ServiceLabel = "service label",
    #[default]
    Option = "option",
    }
}

#[derive(Debug)]
pub struct DeviceExporters {
    pub is_off: bool,
    /// Each with how it is scraped. A time-out comes with each interval.
    pub exporters: Vec<Exporter>,
    pub origin: Origin,
    /// Whether the device's own tags name exporters that it may not name.
    pub ignores_exporters: bool,
}

/// Finds the exporters of a device. `options` are the exporters of a device for which nothing else names any.
pub fn of(tags: &mut Tags, declared: Option<&Declared>, options: &[Exporter]) -> DeviceExporters {
    let is_off = tags.read(SCRAPE, boolean, tags::widens_scrape) == Some(false);
    let (origin, mut exporters, ignores_exporters) = exporters(tags, declared, options);
    tags.set(&mut exporters, SCHEME, scheme, |exporter| &mut exporter.scheme, tags::changes_scheme);
    tags.set(&mut exporters, INTERVAL, scrape_interval, |exporter| &mut exporter.interval, tags::shortens_interval);
    let has_timeout =
        tags.set(&mut exporters, TIMEOUT, scrape_timeout, |exporter| &mut exporter.timeout, tags::lengthens_timeout);
    let mut is_cut = false;
    for exporter in &mut exporters {
        // The scrape config's interval and time-out are not known here.
        let timeout = exporter.timeout.take().unwrap_or(DEFAULT_TIMEOUT);
        is_cut |= has_timeout && exporter.interval.as_ref().is_some_and(|interval| timeout.1 > interval.1);
        exporter.timeout =
            exporter.interval.clone().map(|interval| if timeout.1 <= interval.1 { timeout } else { interval });
    }
    if has_timeout && exporters.iter().any(|exporter| exporter.interval.is_none()) {
        let owner = tags.owner(tags.is_own(TIMEOUT));
        tags.warnings.push(format!(
            "tag {PREFIX}/{TIMEOUT} of {owner} needs an interval ({PREFIX}/{INTERVAL}); it counts as absent"
        ));
    }
    if is_cut {
        let owner = tags.owner(tags.is_own(TIMEOUT));
        tags.warnings.push(format!("tag {PREFIX}/{TIMEOUT} of {owner} is longer than the interval, which counts"));
    }
    DeviceExporters { is_off, exporters, origin, ignores_exporters }
}

/// The exporters of the first source that has some, where they come from, and whether the device's own tags name others in
/// vain.
fn exporters(tags: &mut Tags, declared: Option<&Declared>, options: &[Exporter]) -> (Origin, Vec<Exporter>, bool) {
    let own = tags.exporters(true);
    if tags.own_tags == OwnTags::All
        && let Some((_, list)) = own
    {
        return (Origin::DeviceTag, list, false);
    }
    let (origin, mut known) = fleet_exporters(tags, declared, options);
    let Some((key, own)) = own else { return (origin, known, false) };
    let is_known = |item: &Exporter| known.iter().any(|known| tags::selects(item, known));
    let unknown: Vec<_> = own.iter().filter(|item| !is_known(item)).map(Exporter::to_string).collect();
    let has_known = unknown.len() < own.len();
    if !unknown.is_empty() {
        let part = if has_known { "only this part" } else { "it" };
        tags.ignored(key, &format!("its fleet has no exporter {}", unknown.join(", ")).into(), part);
    }
    if has_known {
        known.retain(|known| own.iter().any(|item| tags::selects(item, known)));
    }
    (origin, known, !unknown.is_empty())
}

/// The exporters that the device has without its own tags.
fn fleet_exporters(tags: &mut Tags, declared: Option<&Declared>, options: &[Exporter]) -> (Origin, Vec<Exporter>) {
    if let Some((_, list)) = tags.exporters(false) {
        return (Origin::FleetTag, list);
    }
    match declared {
        Some(declared) if !declared.exporters.is_empty() => (Origin::ServiceLabel, declared.exporters.clone()),
        _ => (Origin::Option, options.to_vec()),
    }
}
