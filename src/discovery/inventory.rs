//! All devices as the API listed them last, page by page: an unchanged page is not downloaded, parsed or mapped again, nor is an
//! unchanged device of a changed page.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::entry::{Commons, DevicePage, Entry};
use super::lan;
use super::left_out::LeftOutReason;
use super::mapper::Mapper;
use super::releases::Releases;
use super::target::Rules;
use crate::balena::{Failure, FleetRef, Pages, Source};

/// All devices.
#[derive(Default)]
pub struct Inventory {
    pages: Pages<Arc<DevicePage>>,
    /// The same, but for devices whose address belongs to another one now. They do not change, so that others can share them.
    shown: Arc<Vec<Arc<DevicePage>>>,
    /// Addresses that several devices report.
    shared: Vec<String>,
    releases: Releases,
    /// The version of the releases with which all pages were mapped.
    mapped: u64,
    /// What devices have in common.
    commons: Commons,
}

impl Inventory {
    /// Rises with each page that changes.
    pub fn version(&self) -> u64 {
        self.pages.version()
    }

    /// Makes the next refresh map every device again.
    pub fn forget(&mut self) {
        self.pages.forget();
    }

    /// Asks for every page.
    ///
    /// # Errors
    /// A request or a page fails. The list must not be used then, since it may hold pages of two moments.
    pub fn refresh(&mut self, source: &mut dyn Source, rules: &Rules) -> Result<(), Failure> {
        // A rate limit may have stopped the walk over the devices: it goes on without those that came before it.
        if rules.service_labels && !self.pages.goes_on() {
            self.releases.refresh(source)?;
        }
        let version = self.releases.version();
        let (releases, commons) = (&mut self.releases, &mut self.commons);
        let mut mapper = Mapper { rules, releases, releases_changed: version != self.mapped, commons };
        self.pages.refresh(source, &mut mapper)?;
        self.mapped = version;
        let mut shown: Vec<_> = self.pages.contents().cloned().collect();
        self.shared = lan::leave_out_shared(&mut shown);
        self.shown = shown.into();
        self.commons.tidy();
        Ok(())
    }

    /// The failure, if labels of services are to be read and the server does not know releases.
    pub fn missing_releases(&self) -> Option<Failure> {
        self.releases.missing()
    }

    pub fn has_targets(&self) -> bool {
        self.entries().any(|entry| !entry.targets().is_empty())
    }

    pub fn pages(&self) -> &Arc<Vec<Arc<DevicePage>>> {
        &self.shown
    }

    /// All devices by ascending id. A device without an id keeps its place in the API's answer.
    pub fn entries(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.shown.iter().flat_map(|page| &page.entries)
    }

    /// How many devices are left out, by reason.
    pub fn left_out(&self) -> BTreeMap<LeftOutReason, usize> {
        self.entries().filter_map(|entry| entry.left_out.as_ref()).fold(BTreeMap::new(), |mut counts, left_out| {
            *counts.entry(left_out.reason).or_default() += 1;
            counts
        })
    }

    /// Problems with devices that are listed all the same.
    pub fn warnings(&self) -> impl Iterator<Item = &str> {
        let of_devices = self.shown.iter().flat_map(|page| &page.warnings).chain(&self.shared).map(String::as_str);
        of_devices.chain(self.releases.warnings())
    }

    /// Slugs of the fleets with devices that this names.
    pub fn fleets_named(&self, wanted: &FleetRef) -> BTreeSet<&str> {
        let fleets = self.entries().filter_map(|entry| entry.common.fleet.as_ref());
        let named = fleets.filter(|fleet| wanted.names(fleet.id, &fleet.name, &fleet.slug));
        named.map(|fleet| fleet.slug.as_str()).collect()
    }
}
