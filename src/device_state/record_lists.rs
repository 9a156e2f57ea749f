//! Lists of records that the status asks for, read page by page. What many records of a page have in common is kept once.

use std::collections::{BTreeSet, HashSet};
use std::hash::Hash;
use std::mem;
use std::num::NonZeroU64;
use std::sync::Arc;

use serde_json::value::RawValue;

use crate::balena::device::{self, describe, up_to};
use crate::balena::{Client, Failure, List, Listing, Pages, Place, Request, Source, WithId};
use crate::text::count;

/// Characters of a word that are kept.
const MAX_LENGTH: usize = 200;

pub trait RecordKind: Sized {
    /// Reads a record, and the id by which they are ordered.
    fn read(raw: &RawValue, shared: &mut Shared) -> serde_json::Result<(u64, Self)>;
}

/// Records by ascending id, page by page.
pub type RecordPages<T> = Vec<Arc<Vec<(u64, T)>>>;

pub struct RecordList<T> {
    client: Client,
    pub listing: Listing,
    pages: Pages<Arc<Vec<(u64, T)>>>,
    /// Ids of the records that the log has called unreadable.
    unreadable: BTreeSet<Option<u64>>,
}

impl<T: RecordKind> RecordList<T> {
    pub fn new(client: &Client, listing: Listing) -> Self {
        RecordList { client: client.clone(), listing, pages: Pages::default(), unreadable: BTreeSet::new() }
    }

    /// Asks for all pages.
    pub fn refresh(&mut self) -> Result<(), Failure> {
        let mut pages = mem::take(&mut self.pages);
        let outcome = pages.refresh(&mut self.client.clone(), self);
        self.pages = pages;
        outcome
    }

    /// Asks for one record only, to see whether the API knows what is asked for.
    pub fn probe(&mut self, list: Listing) -> Result<(), Failure> {
        self.client.get(Request::Page { list, after: 0, limit: 1 }, None).map(drop)
    }

    /// The pages as they were read last.
    pub fn pages(&self) -> RecordPages<T> {
        self.pages.contents().cloned().collect()
    }

    /// Reports, once each, the records of a page that cannot be read. Those with ids above `after` and up to `last` are on the
    /// page: what is gone, or can be read again, is forgotten.
    fn warn(&mut self, after: u64, last: u64, unreadable: &[(Option<u64>, String)]) {
        let is_known = |id: &Option<u64>| self.unreadable.contains(id);
        let new: Vec<_> = unreadable.iter().filter(|(id, _)| !is_known(id)).collect();
        if let Some((id, why)) = new.first() {
            let id = id.map_or("no id".to_owned(), |id| format!("the id {id}"));
            let number = count(new.len(), "record");
            log::warn!(
                "the API gives {number} that cannot be read, so metrics are absent: the first, with {id}: {why}"
            );
        }
        self.unreadable.retain(|id| id.is_none_or(|id| id <= after || id > last));
        self.unreadable.extend(unreadable.iter().map(|(id, _)| id));
    }
}

impl<T: RecordKind> List for RecordList<T> {
    type Page = Arc<Vec<(u64, T)>>;
    type Record<'a> = T;

    fn listing(&self) -> Listing {
        self.listing
    }

    /// A record that cannot be read is skipped, and the log names it. If none of a full page or of the first one can be read,
    /// that is a failure: no value would look like one that is known.
    fn read(
        &mut self, source: &dyn Source, records: Vec<&RawValue>, place: &Place<'_, Self::Page>,
    ) -> Result<Vec<WithId<T>>, Failure> {
        let mut shared = Shared::default();
        let mut read = Vec::with_capacity(records.len());
        let mut unreadable = Vec::new();
        for raw in records {
            match T::read(raw, &mut shared) {
                Ok((id, record)) => {
                    unreadable.extend(shared.problem.take().map(|why| (Some(id), why)));
                    read.push((Some(id), record));
                }
                Err(error) => unreadable.push((device::id(raw), describe(&error))),
            }
        }
        if read.is_empty()
            && (place.is_full || place.after == 0)
            && let Some((_, why)) = unreadable.first()
        {
            return Err(self.invalid(source, &format!("none of the {} can be read: {why}", self.listing.what())));
        }
        let ids = read.iter().map(|(id, _)| *id).chain(unreadable.iter().map(|(id, _)| *id));
        let last = ids.max().flatten().filter(|_| place.is_full);
        self.warn(place.after, last.unwrap_or(u64::MAX), &unreadable);
        Ok(read)
    }

    fn page(&mut self, _: &mut dyn Source, records: Vec<WithId<T>>) -> Result<Self::Page, Failure> {
        Ok(Arc::new(records.into_iter().filter_map(|(id, record)| Some((id?, record))).collect()))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Image {
    /// None where the key may not read it.
    pub id: Option<NonZeroU64>,
    /// Id of the release that it belongs to. An image that two releases share belongs to the newer one as soon as that is
    /// downloaded.
    pub release: Option<NonZeroU64>,
}

/// What the records of a page share, and what is wrong with the last one.
#[derive(Default)]
pub struct Shared {
    words: HashSet<Arc<str>>,
    images: HashSet<Arc<[Image]>>,
    /// Why a part of a record is absent.
    pub problem: Option<String>,
}

impl Shared {
    pub fn word(&mut self, word: &str) -> Arc<str> {
        share(&mut self.words, up_to(MAX_LENGTH, word))
    }

    pub fn images(&mut self, images: &[Image]) -> Arc<[Image]> {
        share(&mut self.images, images)
    }
}

fn share<T: Eq + Hash + ?Sized>(known: &mut HashSet<Arc<T>>, value: &T) -> Arc<T>
where
    Arc<T>: for<'a> From<&'a T>,
{
    if let Some(known) = known.get(value) {
        return known.clone();
    }
    let new = Arc::from(value);
    known.insert(Arc::clone(&new));
    new
}
