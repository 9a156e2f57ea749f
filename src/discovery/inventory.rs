//! The fleet as it was last told, page by page: a page that did not change costs no body, no parsing, no mapping.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;

use serde_json::value::RawValue;

use crate::balena::device::{self, Device, Text, one};
use crate::balena::failure::Failure;
use crate::balena::query::FleetRef;
use crate::discovery::target::{self, LeftOut, Rules};

/// Devices asked for at once.
const TOP: usize = 1000;
/// Pages that a server may make us keep: a million devices.
const MOST_PAGES: usize = 1000;

/// Bytes that a server may make us keep.
const LARGEST_LIST: usize = 1 << 30;

/// Where pages of devices come from.
pub trait Source {
    /// What people know it by.
    fn name(&self) -> &str;
    /// Up to `top` devices with ids above `after`, by rising id, unless that page still has this `ETag`.
    fn page(&mut self, after: u64, top: usize, etag: Option<&str>) -> Result<Answer, Failure>;
    /// The next device after `after`, its id, uuid and name only.
    fn identity(&mut self, after: u64) -> Result<Answer, Failure>;
}

/// What a source says of a page.
#[derive(Debug)]
pub enum Answer {
    /// It still has the `ETag` that was named.
    Unchanged,
    /// The `ETag` by which to ask for it again, and `{"d": [ … ]}`.
    Devices(Option<String>, Vec<u8>),
    /// It is larger than an answer may be; the `ETag` by which to ask for it again.
    TooLarge(Option<String>),
}

/// A device: what is listed of it, or why nothing is.
#[derive(Debug, Default)]
pub struct Entry {
    /// Its id, or 0 where it has none of its own.
    pub id: u64,
    /// How people are told of it.
    pub name: Box<str>,
    /// How many target groups it has.
    pub targets: usize,
    /// Its target groups, one a line, with `,\n` between.
    pub text: Box<[u8]>,
    /// Why it has none.
    pub left_out: Option<Box<LeftOut>>,
    /// Fingerprint of the API's record, from which all of this was made; 0: it has to be made anew. Of a device in the
    /// target file, whose text is not kept, that of its text.
    pub record: u64,
    /// Its fleet: id, name, slug.
    pub fleet: Option<Arc<(Option<u64>, String, String)>>,
}

/// The devices with ids above `after`, up to where the next page begins.
#[derive(Default)]
struct Page {
    after: u64,
    top: usize,
    /// The last id that it covers; none: it covers the rest.
    end: Option<u64>,
    etag: Option<String>,
    entries: Vec<Arc<Entry>>,
    /// Bytes of their texts.
    size: usize,
    warnings: Vec<String>,
}

/// All pages.
#[derive(Default)]
pub struct Inventory {
    pages: Vec<Page>,
    /// Rises with each page that is not what it was.
    pub version: u64,
}

impl Inventory {
    /// Asks for every page. After an error the list must not be used, since pages of two times may stand side by side;
    /// what came until then is kept, so that the next try is cheaper.
    pub fn refresh(&mut self, source: &mut dyn Source, rules: &Rules) -> Result<(), Failure> {
        let (mut index, mut after, mut size) = (0, 0, 0);
        loop {
            if let Some(page) = self.fetch(index, after, source, rules)? {
                // The new page takes the place of all old ones that begin within it.
                let within = |old: &Page| page.end.is_none_or(|end| old.after < end);
                let replaced = self.pages[index..].iter().take_while(|old| within(old)).count();
                self.pages.splice(index..index + replaced, [page]);
                self.version += 1;
            }
            size += self.pages[index].size;
            match self.pages[index].end {
                Some(end) if index + 1 < MOST_PAGES && size < LARGEST_LIST => (index, after) = (index + 1, end),
                Some(_) => return Err(bad(source, "it goes on without end")),
                None => return Ok(()),
            }
        }
    }

    /// The page that begins after `after`, or nothing if the one kept at `index` is still true.
    fn fetch(&self, index: usize, after: u64, source: &mut dyn Source, rules: &Rules) -> Result<Option<Page>, Failure> {
        let old = self.pages.get(index).filter(|old| old.after == after);
        let (mut top, mut etag) = old.map_or((TOP, None), |old| (old.top, old.etag.as_deref()));
        loop {
            match source.page(after, top, etag)? {
                Answer::Unchanged => return Ok(None),
                Answer::Devices(etag, body) => {
                    let next = self.pages.iter().map(|old| old.after).find(|next| *next > after);
                    let page = Page { after, top, etag, ..Page::default() };
                    let page = page.read(&body, self.pages.get(index), next, rules);
                    return page.map(Some).map_err(|what| bad(source, what));
                }
                Answer::TooLarge(_) if top > 1 => (top, etag) = (top / 2, None),
                Answer::TooLarge(etag) => return Page::too_large(after, etag, source, rules).map(Some),
            }
        }
    }

    /// The target groups of each device that has some: with `,\n` between them they make the list.
    pub fn texts(&self) -> impl Iterator<Item = &[u8]> {
        self.entries().map(|entry| &*entry.text).filter(|text| !text.is_empty())
    }

    /// All devices by rising id; those without an id stand where they came.
    pub fn entries(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.pages.iter().flat_map(|page| &page.entries)
    }

    /// What is amiss with devices that are listed all the same.
    pub fn warnings(&self) -> impl Iterator<Item = &str> {
        self.pages.iter().flat_map(|page| &page.warnings).map(String::as_str)
    }

    /// Slugs of the fleets with devices that this names.
    pub fn fleets_named(&self, wanted: &FleetRef) -> BTreeSet<&str> {
        let fleets = self.entries().filter_map(|entry| entry.fleet.as_deref());
        let named = fleets.filter(|(id, name, slug)| match wanted {
            FleetRef::Id(wanted) => *id == Some(*wanted),
            FleetRef::Name(wanted) => name == wanted,
            FleetRef::Slug(wanted) => slug == wanted,
        });
        named.map(|(_, _, slug)| slug.as_str()).collect()
    }
}

impl Page {
    /// Fills it. `old` is what stood in its place: a device of which the API says what it said before costs no more than to
    /// see that. `next` is where the following page began so far: a device that goes would shift all pages behind it; so
    /// a page ends there again, if it is still worth its request.
    fn read(mut self, body: &[u8], old: Option<&Page>, next: Option<u64>, rules: &Rules) -> Result<Self, String> {
        let mut old = old.map(|old| &*old.entries).unwrap_or_default().iter().peekable();
        let find = |raw| {
            let record = fingerprint(RawValue::get(raw).as_bytes());
            if let Some(entry) = old.next_if(|entry| entry.record == record && record > 0) {
                return (Some(entry.id).filter(|id| *id > 0), record, Ok(entry.clone()));
            }
            let device = device::parse(raw);
            while old.next_if(|entry| Some(entry.id) <= device.id).is_some() {}
            (device.id, record, Err(device))
        };
        let records = device::records(body).map_err(|error| device::told(&error))?;
        let mut found: Vec<_> = records.into_iter().map(find).collect();
        let ids: Vec<u64> = found.iter().filter_map(|(id, ..)| *id).collect();
        if ids.first().is_some_and(|first| *first <= self.after) || !ids.is_sorted() {
            return Err("the ids do not rise".into());
        }
        if found.len() >= self.top {
            self.end = Some(*ids.last().ok_or("no device has an id")?);
            let kept = ids.iter().take_while(|id| next.is_none_or(|next| **id <= next)).count();
            if kept < ids.len() && kept >= self.top / 2 {
                self.end = next;
                found.retain(|(id, ..)| *id <= next);
            }
        }
        let mut last = None;
        for (id, record, found) in found {
            let entry = found.unwrap_or_else(|mut device| {
                if id.is_some() && id == last {
                    device.broken = Some("it comes twice, and the first one stays".into());
                    device.id = None;
                }
                self.entry(&device, record, rules)
            });
            self.size += entry.text.len();
            self.entries.push(entry);
            last = id.or(last);
        }
        Ok(self)
    }

    /// The page of one device that is too large to be read: it is left out, and named.
    fn too_large(after: u64, etag: Option<String>, source: &mut dyn Source, rules: &Rules) -> Result<Self, Failure> {
        let identity = source.identity(after)?;
        let bad = || bad(source, format!("the device after id {after} is too large, and has no name"));
        let Answer::Devices(_, body) = identity else { return Err(bad()) };
        let mut device = device::parse_page(&body).ok().and_then(|mut devices| devices.pop()).ok_or_else(bad)?;
        device.broken = Some("it is too large; remove long tags".into());
        let end = Some(device.id.filter(|id| *id > after).ok_or_else(bad)?);
        let mut page = Page { after, top: 1, end, etag, ..Page::default() };
        page.entries = vec![page.entry(&device, 0, rules)];
        Ok(page)
    }

    fn entry(&mut self, device: &Device, record: u64, rules: &Rules) -> Arc<Entry> {
        let (mut text, warned) = (Vec::new(), self.warnings.len());
        let mapped = target::map(device, rules, &mut text, &mut self.warnings);
        let (targets, left_out) = mapped.map_or_else(|why| (0, Some(why.into())), |targets| (targets, None));
        // Warnings are made anew each time.
        let record = if self.warnings.len() > warned { 0 } else { record };
        let fleet = one(&device.fleet).map(|fleet| {
            let text = |text: &Option<Text>| text.as_deref().unwrap_or_default().to_owned();
            let fleet = (fleet.id, text(&fleet.app_name), text(&fleet.slug));
            let known =
                self.entries.iter().rev().filter_map(|entry| entry.fleet.as_ref()).find(|known| ***known == fleet);
            known.cloned().unwrap_or_else(|| fleet.into())
        });
        let (id, name) = (device.id.unwrap_or_default(), device.display_name().into());
        Entry { id, name, targets, text: text.as_slice().into(), left_out, record, fleet }.into()
    }
}

/// An answer that cannot be used.
fn bad(source: &dyn Source, what: impl Display) -> Failure {
    let hint = "is --api-url (BALENA_API_URL) right?";
    Failure::new("bad_answer", format!("the answer of {} is no page of devices: {what}; {hint}", source.name()))
}

/// Equal texts have equal fingerprints, within one run of the program.
pub fn fingerprint(text: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(text);
    hasher.finish()
}
