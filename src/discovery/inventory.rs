//! Page cache: an unchanged page is not downloaded, parsed or mapped again, nor is an unchanged device of a changed page.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hasher};
use std::iter::Peekable;
use std::slice;
use std::sync::Arc;

use serde_json::value::RawValue;

use super::Source;
use super::services::{Declared, Services};
use super::steering::Origin;
use super::target::{self, LeftOut, Mapped, Rules};
use crate::balena::device::{self, Device, Text, one};
use crate::balena::pages::{Pages, Place, Read, Reader};
use crate::balena::selection::FleetRef;
use crate::balena::{Answer, Failure, Reason};

/// A device: its target groups, or why it has none.
#[derive(Debug, Default)]
pub struct Entry {
    /// Its id, or 0 if it has none.
    pub id: u64,
    /// How it is shown to people.
    pub name: Box<str>,
    /// How many target groups it has.
    pub targets: usize,
    /// Its target groups, one a line, with `,\n` between them.
    pub text: Box<[u8]>,
    /// Why it has none.
    pub left_out: Option<Box<LeftOut>>,
    /// Fingerprint of the API's record that all of this was made from; 0 if it must be made again. For a device of the target
    /// file, whose text is not kept, the fingerprint of its text.
    pub record: u64,
    /// Its fleet.
    pub fleet: Option<Arc<Fleet>>,
    /// The labels of its `balena_device_info`, `uuid="…"` first; empty unless it is kept and the device has an id and a uuid.
    pub info: Box<str>,
    /// Whether balenaCloud sees it online, if that is asked for.
    pub online: Option<bool>,
    /// Where its exporters come from.
    pub origin: Origin,
    /// Id of the release that it runs, or 0.
    pub release: u64,
    /// What the release that it runs declares; none without a release, or where labels of services are not read.
    pub declared: Option<Arc<Declared>>,
}

impl Entry {
    /// Its uuid, if its information is kept.
    pub fn uuid(&self) -> Option<&str> {
        self.uuid_label()?.strip_prefix("uuid=\"")?.strip_suffix('"')
    }

    /// `uuid="…"`, the label that joins its series.
    pub fn uuid_label(&self) -> Option<&str> {
        self.info.split(',').next().filter(|label| !label.is_empty())
    }
}

/// A fleet with devices.
#[derive(Debug, PartialEq, Eq)]
pub struct Fleet {
    /// Database id.
    pub id: Option<u64>,
    /// Its name.
    pub name: String,
    /// `organization/name`.
    pub slug: String,
}

/// All devices.
#[derive(Default)]
pub struct Inventory {
    pages: Pages<Page>,
    /// None where labels of services are not read.
    services: Option<Services>,
    /// The version of the services with which all pages were mapped.
    mapped_services: u64,
    version: u64,
    keeps_info: bool,
}

/// The devices of a page of the API.
#[derive(Default)]
struct Page {
    entries: Vec<Arc<Entry>>,
    warnings: Vec<String>,
}

impl Inventory {
    /// With labels of services, or without, and with what the status needs of each device, or without.
    pub fn new(service_labels: bool, keeps_info: bool) -> Self {
        Inventory { services: service_labels.then(Services::default), keeps_info, ..Inventory::default() }
    }

    /// Rises with each page that changes.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Asks for every page.
    ///
    /// # Errors
    /// A request or a page fails. The list must not be used then, since it may hold pages of two moments.
    pub fn refresh(&mut self, source: &mut dyn Source, rules: &Rules) -> Result<(), Failure> {
        if let Some(services) = &mut self.services {
            services.refresh(source)?;
        }
        let services = self.services.as_mut();
        let services_changed = services.as_ref().is_some_and(|services| services.version() != self.mapped_services);
        let version = &mut self.version;
        let mut mapper = Mapper { source, rules, services, services_changed, keeps_info: self.keeps_info };
        self.pages.refresh(&mut mapper, || *version += 1)?;
        self.mapped_services = self.services.as_ref().map_or(0, Services::version);
        Ok(())
    }

    /// The target groups of each device that has some. With `,\n` between them they are the list.
    pub fn texts(&self) -> impl Iterator<Item = &[u8]> {
        self.entries().map(|entry| &*entry.text).filter(|text| !text.is_empty())
    }

    /// All devices by ascending id. A device without an id keeps its place in the API's answer.
    pub fn entries(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.pages.contents().flat_map(|page| &page.entries)
    }

    /// Problems with devices that are listed all the same.
    pub fn warnings(&self) -> impl Iterator<Item = &str> {
        let services = self.services.iter().flat_map(Services::warnings);
        self.pages.contents().flat_map(|page| &page.warnings).map(String::as_str).chain(services)
    }

    /// Slugs of the fleets with devices that this names.
    pub fn fleets_named(&self, wanted: &FleetRef) -> BTreeSet<&str> {
        let fleets = self.entries().filter_map(|entry| entry.fleet.as_deref());
        let named = fleets.filter(|fleet| match wanted {
            FleetRef::Id(id) => fleet.id == Some(*id),
            FleetRef::Name(name) => fleet.name == *name,
            FleetRef::Slug(slug) => fleet.slug == *slug,
        });
        named.map(|fleet| fleet.slug.as_str()).collect()
    }
}

/// Reads pages and maps their devices.
struct Mapper<'a> {
    source: &'a mut dyn Source,
    rules: &'a Rules,
    services: Option<&'a mut Services>,
    services_changed: bool,
    keeps_info: bool,
}

impl Reader<Page> for Mapper<'_> {
    fn ask(&mut self, after: u64, limit: usize, etag: Option<&str>) -> Result<Answer, Failure> {
        self.source.page(after, limit, etag)
    }

    /// A page has to be mapped again when a release that one of its devices runs declares something else.
    fn is_current(&self, page: &Page) -> bool {
        !self.services_changed || page.entries.iter().all(|entry| self.is_declared(entry))
    }

    fn read(&mut self, body: &[u8], place: Place<'_, Page>) -> Result<Read<Page>, Failure> {
        let records = device::records(body).map_err(|error| self.invalid(&device::describe(&error)))?;
        let mut known = Known::of(place.old);
        let mut found: Vec<_> =
            records.into_iter().map(|raw| known.find(raw, |entry| self.is_declared(entry))).collect();
        let ids: Vec<u64> = found.iter().filter_map(Found::id).collect();
        if ids.first().is_some_and(|first| *first <= place.after) || !ids.is_sorted() {
            return Err(self.invalid("the ids do not rise"));
        }
        let mut end = None;
        if found.len() >= place.limit {
            let last = *ids.last().ok_or_else(|| self.invalid("no device has an id"))?;
            end = Some(stable_end(&ids, last, &place));
            found.retain(|found| found.id() <= end);
        }
        if let Some(services) = &mut self.services {
            let releases: Vec<u64> = found.iter().filter_map(Found::release).collect();
            services.fetch(self.source, &releases)?;
        }
        Ok(self.page(found, end))
    }

    fn too_large(&mut self, after: u64) -> Result<Read<Page>, Failure> {
        let why = format!("the device after id {after} is too large, and has no name");
        let Answer::Body { body, .. } = self.source.identity(after)? else { return Err(self.invalid(&why)) };
        let device = device::parse_page(&body).ok().and_then(|mut devices| devices.pop());
        let mut device = device.ok_or_else(|| self.invalid(&why))?;
        device.broken = Some("it is too large; remove long tags".into());
        let end = device.id.filter(|id| *id > after).ok_or_else(|| self.invalid(&why))?;
        Ok(self.page(vec![Found::New(0, Box::new(device))], Some(end)))
    }

    fn invalid(&self, why: &str) -> Failure {
        let hint = "is --api-url (BALENA_API_URL) right?";
        let message = format!("the answer of {} is no page of devices: {why}; {hint}", self.source.name());
        Failure::new(Reason::BadAnswer, message)
    }
}

/// Where a full page ends: where it ended before, if that is still worth its request. A device that goes would otherwise shift
/// every page behind it.
fn stable_end(ids: &[u64], last: u64, place: &Place<'_, Page>) -> u64 {
    let Some(next) = place.next else { return last };
    let kept = ids.iter().take_while(|id| **id <= next).count();
    if kept < ids.len() && kept >= place.limit / 2 { next } else { last }
}

/// The devices of a page as it was, by ascending id.
struct Known<'a>(Peekable<slice::Iter<'a, Arc<Entry>>>);

/// A device of a page.
enum Found<'a> {
    /// Its record has not changed.
    Same(Arc<Entry>),
    /// Its record's fingerprint, and what the record says.
    New(u64, Box<Device<'a>>),
}

impl Found<'_> {
    /// The release that a device with a new record runs.
    fn release(&self) -> Option<u64> {
        match self {
            Found::Same(_) => None,
            Found::New(_, device) => one(&device.release)?.id,
        }
    }

    fn id(&self) -> Option<u64> {
        match self {
            Found::Same(entry) => Some(entry.id).filter(|id| *id > 0),
            Found::New(_, device) => device.id,
        }
    }
}

impl<'a> Known<'a> {
    fn of(page: Option<&'a Page>) -> Self {
        Known(page.map(|page| &*page.entries).unwrap_or_default().iter().peekable())
    }

    /// The entry of a device whose record has not changed costs no more than a comparison, if it `is_declared` still.
    fn find<'r>(&mut self, raw: &'r RawValue, is_declared: impl Fn(&Entry) -> bool) -> Found<'r> {
        let record = fingerprint(raw.get().as_bytes());
        let is_same = |entry: &&Arc<Entry>| entry.record == record && record > 0 && is_declared(entry);
        if let Some(entry) = self.0.next_if(is_same) {
            return Found::Same(entry.clone());
        }
        let device = device::parse(raw);
        while self.0.next_if(|entry| Some(entry.id) <= device.id).is_some() {}
        Found::New(record, Box::new(device))
    }
}

impl Mapper<'_> {
    /// Whether the release of a device declares what the device was mapped with. A release that the API does not list any more
    /// says nothing about it.
    fn is_declared(&self, entry: &Entry) -> bool {
        let Some(now) = self.services.as_ref().and_then(|services| services.get(entry.release)) else { return true };
        entry.declared.as_ref().is_some_and(|declared| Arc::ptr_eq(now, declared))
    }

    fn page(&self, found: Vec<Found>, end: Option<u64>) -> Read<Page> {
        let mut page = Page::default();
        let mut last = None;
        for found in found {
            let id = found.id();
            let entry = match found {
                Found::Same(entry) => entry,
                Found::New(record, mut device) => {
                    if id.is_some() && id == last {
                        device.broken = Some("it comes twice, and the first one stays".into());
                        device.id = None;
                    }
                    self.entry(&mut page, &device, record).into()
                }
            };
            page.entries.push(entry);
            last = id.or(last);
        }
        let size = page.entries.iter().map(|entry| entry.text.len() + entry.info.len()).sum();
        Read { content: page, end, size }
    }

    fn entry(&self, page: &mut Page, device: &Device, record: u64) -> Entry {
        let mut text = Vec::new();
        let warned = page.warnings.len();
        let release = one(&device.release).and_then(|release| release.id).unwrap_or_default();
        let declared = self.services.as_ref().and_then(|services| services.get(release)).cloned();
        let mapped = target::map(device, declared.as_deref(), self.rules, &mut text, &mut page.warnings);
        let (mapped, left_out) = match mapped {
            Ok(mapped) => (mapped, None),
            Err(left_out) => (Mapped::default(), Some(left_out.into())),
        };
        let info = match (device.id, device.uuid()) {
            (Some(_), Some(uuid)) if self.keeps_info => self.rules.info(uuid, device),
            _ => String::new(),
        };
        Entry {
            id: device.id.unwrap_or_default(),
            name: device.display_name().into(),
            targets: mapped.targets,
            origin: mapped.origin,
            release,
            declared,
            text: text.as_slice().into(),
            left_out,
            // Warnings belong to the page, so a device with one is mapped again with each new page.
            record: if page.warnings.len() > warned { 0 } else { record },
            fleet: page.fleet(device),
            info: info.into(),
            online: device.is_online,
        }
    }
}

impl Page {
    /// The device's fleet, shared with its neighbours of the same fleet.
    fn fleet(&self, device: &Device) -> Option<Arc<Fleet>> {
        let fleet = one(&device.fleet)?;
        let text = |text: &Option<Text>| text.as_deref().unwrap_or_default().to_owned();
        let fleet = Fleet { id: fleet.id, name: text(&fleet.app_name), slug: text(&fleet.slug) };
        let mut known = self.entries.iter().rev().filter_map(|entry| entry.fleet.as_ref());
        Some(known.find(|known| ***known == fleet).cloned().unwrap_or_else(|| fleet.into()))
    }
}

/// Equal texts have equal fingerprints within one run of the program.
pub fn fingerprint(text: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(text);
    hasher.finish()
}
