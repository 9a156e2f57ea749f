//! Page cache: an unchanged page is not downloaded, parsed or mapped again, nor is an unchanged device of a changed page.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::entry::{Commons, Entry, Page};
use super::mapper::Mapper;
use super::releases::Releases;
use super::shared_addresses;
use super::target::Rules;
use crate::balena::pages::{Pages, Walks};
use crate::balena::selection::FleetRef;
use crate::balena::{Failure, Source};

/// All devices.
#[derive(Default)]
pub struct Inventory {
    pages: Pages<Arc<Page>>,
    /// The same, but for devices whose address belongs to another one now.
    shown: Vec<Arc<Page>>,
    /// Addresses that several devices report.
    shared: Vec<String>,
    /// None where labels of services are not read.
    services: Option<Releases>,
    /// The version of the services with which all pages were mapped.
    mapped_services: u64,
    walks: Walks,
    /// What devices have in common.
    commons: Commons,
}

impl Inventory {
    /// An empty inventory. `service_labels` reads the labels of services.
    pub fn new(service_labels: bool) -> Self {
        Inventory { services: service_labels.then(Releases::default), ..Inventory::default() }
    }

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
        self.walks.walk(|walk| {
            if let Some(services) = &mut self.services {
                services.refresh(source, walk)?;
            }
            let services = self.services.as_mut();
            let services_changed = services.as_ref().is_some_and(|services| services.version() != self.mapped_services);
            let mut mapper = Mapper { source, rules, services, services_changed, commons: &mut self.commons };
            self.pages.refresh(&mut mapper, walk)
        })?;
        self.shown = self.pages.contents().cloned().collect();
        self.shared = shared_addresses::leave_out(&mut self.shown);
        self.commons.tidy();
        self.mapped_services = self.services.as_ref().map_or(0, Releases::version);
        Ok(())
    }

    /// The failure, if labels of services are to be read and the server does not know releases.
    pub fn missing_releases(&self) -> Option<Failure> {
        self.services.as_ref()?.missing()
    }

    /// Whether a device has a target.
    pub fn has_targets(&self) -> bool {
        self.shown.iter().any(|page| page.targets > 0)
    }

    /// The pages. They do not change, so that a copy of the list shares them.
    pub fn pages(&self) -> impl Iterator<Item = &Arc<Page>> {
        self.shown.iter()
    }

    /// All devices by ascending id. A device without an id keeps its place in the API's answer.
    pub fn entries(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.shown.iter().flat_map(|page| &page.entries)
    }

    /// Problems with devices that are listed all the same.
    pub fn warnings(&self) -> impl Iterator<Item = &str> {
        let services = self.services.iter().flat_map(Releases::warnings);
        let shared = self.shared.iter().map(String::as_str);
        self.shown.iter().flat_map(|page| &page.warnings).map(String::as_str).chain(services).chain(shared)
    }

    /// Slugs of the fleets with devices that this names.
    pub fn fleets_named(&self, wanted: &FleetRef) -> BTreeSet<&str> {
        let fleets = self.entries().filter_map(|entry| entry.common.fleet.as_ref());
        let named = fleets.filter(|fleet| wanted.names(fleet.id, &fleet.name, &fleet.slug));
        named.map(|fleet| fleet.slug.as_str()).collect()
    }
}
