//! Lists of records that the status asks for, read page by page.

use std::collections::BTreeSet;
use std::marker::PhantomData;
use std::sync::Arc;

use serde_json::value::RawValue;

use super::shared::Shared;
use crate::balena::device::{self, describe};
use crate::balena::pages::{self, List, Place, Walks};
use crate::balena::query::StateFields;
use crate::balena::{Client, Failure, Listing, Reason, Request, Source};
use crate::text::count;

/// A kind of records.
pub trait RecordKind: Sized {
    /// What they are, for messages.
    const WHAT: &'static str = "devices";

    /// What they are a part of. `more` is what is asked for of a state.
    fn list(more: StateFields) -> Listing<'static>;

    /// Reads one.
    ///
    /// # Errors
    /// A field has the wrong type.
    fn read(raw: &RawValue, shared: &mut Shared) -> serde_json::Result<Self>;

    /// Its id.
    fn id(&self) -> u64;
}

/// Records by ascending id, page by page.
pub type RecordPages<T> = Vec<Arc<Vec<T>>>;

/// A list of records.
pub struct RecordList<T> {
    /// How they are asked for and read.
    pub reading: Reading<T>,
    pages: pages::Pages<Arc<Vec<T>>>,
    walks: Walks,
}

/// How records are asked for and read.
pub struct Reading<T> {
    client: Client,
    /// What is asked for of a state.
    pub more: StateFields,
    /// Ids of the records that the log has called unreadable.
    unreadable: BTreeSet<Option<u64>>,
    kind: PhantomData<T>,
}

impl<T: RecordKind> RecordList<T> {
    /// Nothing has been asked for.
    pub fn new(client: &Client) -> Self {
        let (client, more) = (client.clone(), [true; _]);
        let reading = Reading { client, more, unreadable: BTreeSet::new(), kind: PhantomData };
        RecordList { reading, pages: pages::Pages::default(), walks: Walks::default() }
    }

    /// Asks for all pages. Returns whether one has changed.
    ///
    /// # Errors
    /// A request or a page fails.
    pub fn refresh(&mut self) -> Result<bool, Failure> {
        let before = self.pages.version();
        self.walks.walk(|walk| self.pages.refresh(&mut self.reading, walk))?;
        Ok(self.pages.version() != before)
    }

    /// Asks for one record only, to see whether the API knows what is asked for.
    ///
    /// # Errors
    /// It does not, or there is no usable answer.
    pub fn probe(&mut self, more: StateFields) -> Result<(), Failure> {
        self.reading.client.get(Request::Page { list: T::list(more), after: 0, limit: 1 }, None).map(drop)
    }

    /// The pages as they were read last.
    pub fn pages(&self) -> RecordPages<T> {
        self.pages.contents().cloned().collect()
    }
}

impl<T> Reading<T> {
    /// Reports, once each, the records of a page that cannot be read.
    fn warn(&mut self, unreadable: &[(Option<u64>, String)]) {
        let new: Vec<_> = unreadable.iter().filter(|(id, _)| self.unreadable.insert(*id)).collect();
        let Some((id, why)) = new.first() else { return };
        let id = id.map_or("no id".to_owned(), |id| format!("the id {id}"));
        let number = count(new.len(), "record");
        log::warn!("the API gives {number} that cannot be read, so metrics are absent: the first, with {id}: {why}");
    }
}

impl<T: RecordKind> List for Reading<T> {
    type Page = Arc<Vec<T>>;
    type Record<'a> = T;
    const WHAT: &'static str = T::WHAT;

    fn source(&mut self) -> &mut dyn Source {
        &mut self.client
    }

    fn listing(&self) -> Listing<'static> {
        T::list(self.more)
    }

    /// A record that cannot be read is skipped, and the log names it. If none of a full page or of the first one can be read,
    /// that is a failure: no value would look like one that is known.
    fn read(
        &mut self, records: Vec<&RawValue>, place: &Place<'_, Self::Page>,
    ) -> Result<Vec<(Option<u64>, T)>, Failure> {
        let mut shared = Shared::default();
        let mut read = Vec::with_capacity(records.len());
        let mut unreadable = Vec::new();
        for raw in records {
            match T::read(raw, &mut shared) {
                Ok(record) => read.push((Some(record.id()), record)),
                Err(error) => unreadable.push((device::id(raw), describe(&error))),
            }
        }
        if read.is_empty()
            && (place.is_full || place.after == 0)
            && let Some((_, why)) = unreadable.first()
        {
            return Err(self.invalid(&format!("none of the {} can be read: {why}", T::WHAT)));
        }
        self.warn(&unreadable);
        Ok(read)
    }

    fn page(&mut self, records: Vec<(Option<u64>, T)>) -> Result<(Self::Page, usize), Failure> {
        let size = records.len() * size_of::<T>();
        let records: Vec<T> = records.into_iter().map(|(_, record)| record).collect();
        Ok((records.into(), size))
    }

    fn invalid(&mut self, why: &str) -> Failure {
        let message = format!("the answer of {} is no page of {}: {why}", self.client.url(), T::WHAT);
        Failure::new(Reason::BadAnswer, message)
    }
}
