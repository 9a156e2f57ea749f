//! Reads a page of devices: a device whose record has not changed is not parsed or mapped again.

use std::iter::Peekable;
use std::num::NonZeroU64;
use std::slice;
use std::sync::Arc;

use serde_json::value::RawValue;

use super::entry::{Commons, Entry, Page, fingerprint};
use super::releases::Releases;
use super::target::{self, Rules};
use crate::balena::device::{self, Device};
use crate::balena::pages::{List, Place, WithId};
use crate::balena::{Failure, Fetched, Listing, Request, Source};

/// Reads pages and maps their devices.
pub struct Mapper<'a> {
    /// The API.
    pub source: &'a mut dyn Source,
    /// How devices become targets.
    pub rules: &'a Rules,
    /// None where labels of services are not read.
    pub services: Option<&'a mut Releases>,
    /// Whether they changed since all pages were mapped.
    pub services_changed: bool,
    /// What devices have in common.
    pub commons: &'a mut Commons,
}

impl List for Mapper<'_> {
    type Page = Arc<Page>;
    type Record<'a> = PageDevice<'a>;
    const WHAT: &'static str = "devices";

    fn source(&mut self) -> &mut dyn Source {
        self.source
    }

    fn listing(&self) -> Listing<'static> {
        Listing::Devices
    }

    /// A page has to be mapped again when a release that one of its devices runs declares something else.
    fn is_current(&self, page: &Arc<Page>) -> bool {
        !self.services_changed || page.entries.iter().all(|entry| self.has_current_labels(entry))
    }

    fn read<'a>(
        &mut self, records: Vec<&'a RawValue>, place: &Place<'_, Arc<Page>>,
    ) -> Result<Vec<WithId<PageDevice<'a>>>, Failure> {
        let mut known = OldPage::of(place.old.map(|page| &**page));
        let find = |raw| known.find(raw, |entry| self.has_current_labels(entry));
        Ok(records.into_iter().map(find).collect())
    }

    fn page(&mut self, found: Vec<WithId<PageDevice<'_>>>) -> Result<(Arc<Page>, usize), Failure> {
        if let Some(services) = &mut self.services {
            let releases: Vec<u64> = found.iter().filter_map(|(_, found)| found.release()).collect();
            services.fetch(self.source, &releases)?;
        }
        Ok(self.map(found))
    }

    fn too_large(&mut self, after: u64) -> Result<(u64, Arc<Page>), Failure> {
        let why = format!("the device after id {after} is too large, and has no name");
        let list = Listing::DevicesWith("$select=id,uuid,device_name");
        let request = Request::Page { list, after, limit: 1 };
        let Fetched::Body { body, .. } = self.source.get(request, None)? else { return Err(self.invalid(&why)) };
        let device = device::parse_page(&body).ok().and_then(|mut devices| devices.pop());
        let mut device = device.ok_or_else(|| self.invalid(&why))?;
        device.broken = Some("it is too large; remove long tags".into());
        let id = device.id.filter(|id| *id > after).ok_or_else(|| self.invalid(&why))?;
        let (page, _) = self.map(vec![(Some(id), PageDevice::New(None, Box::new(device)))]);
        Ok((id, page))
    }
}

/// The devices of a page as it was, by ascending id.
struct OldPage<'a>(Peekable<slice::Iter<'a, Arc<Entry>>>);

/// A device of a page.
pub enum PageDevice<'a> {
    /// Its record has not changed.
    Same(Arc<Entry>),
    /// Its record's fingerprint, and what the record says.
    New(Option<NonZeroU64>, Box<Device<'a>>),
}

impl PageDevice<'_> {
    /// The release that a device with a new record runs.
    fn release(&self) -> Option<u64> {
        match self {
            PageDevice::Same(_) => None,
            PageDevice::New(_, device) => device.release.as_ref()?.id,
        }
    }
}

impl<'a> OldPage<'a> {
    fn of(page: Option<&'a Page>) -> Self {
        OldPage(page.map(|page| &*page.entries).unwrap_or_default().iter().peekable())
    }

    /// Parses a record, unless it has not changed and the entry `has_current_labels`: then the entry stays.
    fn find<'r>(&mut self, raw: &'r RawValue, has_current_labels: impl Fn(&Entry) -> bool) -> WithId<PageDevice<'r>> {
        let record = NonZeroU64::new(fingerprint(raw.get().as_bytes()));
        let is_same = |entry: &&Arc<Entry>| record.is_some() && entry.record == record && has_current_labels(entry);
        if let Some(entry) = self.0.next_if(is_same) {
            return (entry.id(), PageDevice::Same(entry.clone()));
        }
        let device = device::parse(raw);
        while self.0.next_if(|entry| entry.id() <= device.id).is_some() {}
        (device.id, PageDevice::New(record, Box::new(device)))
    }
}

impl Mapper<'_> {
    /// Whether a device was mapped with the service labels that its release has now. A release that the API does not list any
    /// more counts as unchanged.
    fn has_current_labels(&self, entry: &Entry) -> bool {
        let common = &entry.common;
        let Some(now) = self.services.as_ref().and_then(|services| services.get(common.release?)) else { return true };
        common.declared.as_ref() == Some(now)
    }

    fn map(&mut self, found: Vec<WithId<PageDevice>>) -> (Arc<Page>, usize) {
        let (mut entries, mut warnings) = (Vec::new(), Vec::new());
        let mut last = None;
        for (id, found) in found {
            let entry = match found {
                PageDevice::Same(entry) => entry,
                PageDevice::New(record, mut device) => {
                    if id.is_some() && id == last {
                        device.broken = Some("it comes twice, and the first record counts".into());
                        device.id = None;
                    }
                    self.entry(&mut warnings, &device, record).into()
                }
            };
            entries.push(entry);
            last = id.or(last);
        }
        let size = entries.iter().map(|entry: &Arc<Entry>| entry.size()).sum();
        (Page::new(entries, warnings).into(), size)
    }

    fn entry(&mut self, warnings: &mut Vec<String>, device: &Device, record: Option<NonZeroU64>) -> Entry {
        let warned = warnings.len();
        let release = device.release.as_ref().and_then(|release| release.id);
        let declared = self.services.as_ref().and_then(|services| services.get(release?));
        let mut entry = target::map(device, declared, self.rules, self.commons, warnings);
        // Warnings belong to the page, so a device with one is mapped again with each new page.
        entry.record = record.filter(|_| warnings.len() == warned);
        entry
    }
}
