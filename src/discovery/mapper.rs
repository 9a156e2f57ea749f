//! Reads a page of devices: a device whose record has not changed is not parsed or mapped again.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::Arc;

use serde_json::value::RawValue;

use super::entry::{Commons, DevicePage, Entry, fingerprint};
use super::releases::Releases;
use super::target::{self, Rules};
use crate::balena::{Device, Failure, Fetched, List, Listing, Place, Request, Source, WithId, device};

/// Reads pages and maps their devices.
pub struct Mapper<'a> {
    pub rules: &'a Rules,
    pub releases: &'a mut Releases,
    /// Whether releases have changed since all pages were mapped.
    pub releases_changed: bool,
    pub commons: &'a mut Commons,
}

impl List for Mapper<'_> {
    type Page = Arc<DevicePage>;
    type Record<'a> = PageDevice<'a>;

    fn listing(&self) -> Listing {
        Listing::Devices
    }

    /// A page has to be mapped again when a release that one of its devices runs declares something else.
    fn is_current(&self, page: &Arc<DevicePage>) -> bool {
        !self.releases_changed || page.entries.iter().all(|entry| self.has_current_labels(entry))
    }

    /// Parses the records that have changed. The entries of the others stay, if they have current labels.
    fn read<'a>(
        &mut self, _: &dyn Source, records: Vec<&'a RawValue>, place: &Place<'_, Arc<DevicePage>>,
    ) -> Result<Vec<WithId<PageDevice<'a>>>, Failure> {
        let old = place.old.iter().flat_map(|page| &page.entries);
        let mut old: HashMap<_, _> = old.filter_map(|entry| Some((entry.record?, entry))).collect();
        let read = records.into_iter().map(|raw| {
            let record = NonZeroU64::new(fingerprint(raw.get().as_bytes()));
            let known = record.and_then(|record| old.remove(&record));
            if let Some(entry) = known.filter(|entry| self.has_current_labels(entry)) {
                return (entry.id(), PageDevice::Same(entry.clone()));
            }
            let device = device::parse(raw);
            (device.id, PageDevice::New(record, Box::new(device)))
        });
        Ok(read.collect())
    }

    fn page(&mut self, source: &mut dyn Source, devices: Vec<WithId<PageDevice>>) -> Result<Arc<DevicePage>, Failure> {
        if self.rules.service_labels {
            let release = |(_, device): &WithId<PageDevice>| match device {
                PageDevice::Same(_) => None,
                PageDevice::New(_, device) => device.release_id(),
            };
            self.releases.fetch(source, devices.iter().filter_map(release).collect())?;
        }
        Ok(self.map(devices))
    }

    fn too_large(&mut self, source: &mut dyn Source, after: u64) -> Result<(u64, Arc<DevicePage>), Failure> {
        let why = format!("the device after id {after} is too large, and has no name");
        let list = Listing::DevicesWith("$select=id,uuid,device_name");
        let request = Request::Page { list, after, limit: 1 };
        let Fetched::Body { body, .. } = source.get(request, None)? else { return Err(self.invalid(source, &why)) };
        let device = device::parse_page(&body).ok().and_then(|mut devices| devices.pop());
        let mut device = device.ok_or_else(|| self.invalid(source, &why))?;
        device.broken = Some("it is too large; remove long tags".into());
        let id = device.id.filter(|id| *id > after).ok_or_else(|| self.invalid(source, &why))?;
        Ok((id, self.map(vec![(Some(id), PageDevice::New(None, Box::new(device)))])))
    }
}

/// A device of a page.
pub enum PageDevice<'a> {
    /// Its record has not changed.
    Same(Arc<Entry>),
    /// Its record's fingerprint, and what the record says.
    New(Option<NonZeroU64>, Box<Device<'a>>),
}

impl Mapper<'_> {
    /// Whether a device was mapped with the service labels that its release has now. A release that the API does not list any
    /// more counts as unchanged.
    fn has_current_labels(&self, entry: &Entry) -> bool {
        let now = entry.common.release.and_then(|release| self.releases.get(release));
        now.is_none() || now == entry.common.declared.as_ref()
    }

    fn map(&mut self, devices: Vec<WithId<PageDevice>>) -> Arc<DevicePage> {
        let (mut entries, mut warnings) = (Vec::new(), Vec::new());
        let mut last = None;
        for (id, device) in devices {
            let entry = match device {
                PageDevice::Same(entry) => entry,
                PageDevice::New(mut record, mut device) => {
                    if id.is_some() && id == last {
                        device.broken = Some("it comes twice, and the first record counts".into());
                        // Another record with the same text is that of the first.
                        (device.id, record) = (None, None);
                    }
                    let warned = warnings.len();
                    let declared = device.release_id().and_then(|release| self.releases.get(release));
                    let mut entry = target::map(&device, declared, self.rules, self.commons, &mut warnings);
                    // Warnings belong to the page, so a device with one is mapped again with each new page.
                    entry.record = record.filter(|_| warnings.len() == warned);
                    entry.into()
                }
            };
            entries.push(entry);
            last = id.or(last);
        }
        DevicePage { entries, warnings }.into()
    }
}
