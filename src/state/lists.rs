//! Lists of records that the status asks for, read page by page.

use std::marker::PhantomData;
use std::sync::Arc;

use serde_json::value::RawValue;

use super::shared::Shared;
use crate::balena::device::describe;
use crate::balena::pages::{self, List, Place, Walks};
use crate::balena::query::StateFields;
use crate::balena::{Client, Failure, Listing, Reason, Request, Source};

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
    client: Client,
    /// What is asked for of a state.
    pub more: StateFields,
    pages: pages::Pages<Arc<Vec<T>>>,
    walks: Walks,
}

impl<T: RecordKind> RecordList<T> {
    /// Nothing has been asked for.
    pub fn new(client: &Client) -> Self {
        RecordList { client: client.clone(), more: [true; _], pages: pages::Pages::default(), walks: Walks::default() }
    }

    /// Asks for all pages. Returns whether one has changed.
    ///
    /// # Errors
    /// A request or a page fails.
    pub fn refresh(&mut self) -> Result<bool, Failure> {
        let RecordList { client, more, pages, walks } = self;
        let before = pages.version();
        walks.walk(|walk| pages.refresh(&mut Reading { client, more: *more, kind: PhantomData::<T> }, walk))?;
        Ok(pages.version() != before)
    }

    /// Asks for one record only, to see whether the API knows what is asked for.
    ///
    /// # Errors
    /// It does not, or there is no usable answer.
    pub fn probe(&mut self, more: StateFields) -> Result<(), Failure> {
        self.client.get(Request::Page { list: T::list(more), after: 0, limit: 1 }, None).map(drop)
    }

    /// The pages as they were read last.
    pub fn pages(&self) -> RecordPages<T> {
        self.pages.contents().cloned().collect()
    }
}

struct Reading<'a, T> {
    client: &'a mut Client,
    more: StateFields,
    kind: PhantomData<T>,
}

impl<T: RecordKind> List for Reading<'_, T> {
    type Page = Arc<Vec<T>>;
    type Record<'a> = T;
    const WHAT: &'static str = T::WHAT;

    fn source(&mut self) -> &mut dyn Source {
        self.client
    }

    fn listing(&self) -> Listing<'static> {
        T::list(self.more)
    }

    /// A record that cannot be read is skipped: discovery reports a device. If none of a full page or of the first one can be read, that
    /// is a failure: no value would look like one that is known.
    fn read(
        &mut self, records: Vec<&RawValue>, place: &Place<'_, Self::Page>,
    ) -> Result<Vec<(Option<u64>, T)>, Failure> {
        let mut shared = Shared::default();
        let mut read = Vec::with_capacity(records.len());
        let mut unreadable = None;
        for raw in records {
            match T::read(raw, &mut shared) {
                Ok(record) => read.push((Some(record.id()), record)),
                Err(error) => unreadable = Some(error),
            }
        }
        if let Some(error) = unreadable.filter(|_| read.is_empty() && (place.is_full || place.after == 0)) {
            return Err(self.invalid(&format!("none of the {} can be read: {}", T::WHAT, describe(&error))));
        }
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
