//! Lists of records that the status asks for, read page by page.

use std::sync::Arc;

use serde_json::value::RawValue;

use super::devices::Pages;
use super::installs::{NotRunning, Running};
use super::reported::{Report, State};
use super::shared::Shared;
use crate::balena::device::describe;
use crate::balena::pages::{self, List, Place, Walks};
use crate::balena::query::StateFields;
use crate::balena::{Client, Failure, Reason, Request, Source};

/// What the supervisors report.
const REPORTS: &str =
    "$select=id,memory_usage,memory_total,storage_usage,storage_total,cpu_usage,cpu_temp,is_undervolted";
/// The images that run. A count of them would not tell those of the release from the supervisor's own.
const RUNNING: &str = "$select=id&$expand=image_install($select=installs__image,is_provided_by__release;\
    $filter=status%20eq%20'Running';$orderby=id%20asc)";

/// A list of records.
pub struct Records<T> {
    client: Client,
    kind: Kind<T>,
    /// What is asked for of a state.
    pub more: StateFields,
    pages: pages::Pages<Arc<Vec<T>>>,
    walks: Walks,
}

/// What is asked for, and how it is read.
struct Kind<T> {
    what: &'static str,
    request: fn(StateFields, u64, usize) -> Request<'static>,
    next_id: fn(u64) -> Request<'static>,
    read: fn(&RawValue, &mut Shared) -> serde_json::Result<T>,
    id: fn(&T) -> u64,
}

fn next_device(after: u64) -> Request<'static> {
    Request::DevicesWith { what: "$select=id", after, limit: 1 }
}

impl Records<State> {
    /// The state of each device.
    pub fn states(client: &Client) -> Self {
        Records::new(
            client,
            Kind {
                what: "devices",
                request: |more, after, limit| Request::State { more, after, limit },
                next_id: next_device,
                read: State::read,
                id: |state| state.id,
            },
        )
    }
}

impl Records<Report> {
    /// What the supervisor of each device reports.
    pub fn reports(client: &Client) -> Self {
        Records::new(
            client,
            Kind {
                what: "devices",
                request: |_, after, limit| Request::DevicesWith { what: REPORTS, after, limit },
                next_id: next_device,
                read: Report::read,
                id: |report| report.id,
            },
        )
    }
}

impl Records<Running> {
    /// The images that run on each device.
    pub fn running(client: &Client) -> Self {
        Records::new(
            client,
            Kind {
                what: "devices",
                request: |_, after, limit| Request::DevicesWith { what: RUNNING, after, limit },
                next_id: next_device,
                read: Running::read,
                id: |running| running.id,
            },
        )
    }
}

impl Records<NotRunning> {
    /// The services that do not run.
    pub fn not_running(client: &Client) -> Self {
        Records::new(
            client,
            Kind {
                what: "services",
                request: |_, after, limit| Request::NotRunning { after, limit },
                next_id: Request::NextNotRunning,
                read: NotRunning::read,
                id: |install| install.id,
            },
        )
    }
}

impl<T> Records<T> {
    fn new(client: &Client, kind: Kind<T>) -> Self {
        Records {
            client: client.clone(),
            kind,
            more: StateFields::ALL,
            pages: pages::Pages::default(),
            walks: Walks::default(),
        }
    }

    /// Asks for all pages. Returns whether one has changed.
    ///
    /// # Errors
    /// A request or a page fails.
    pub fn refresh(&mut self) -> Result<bool, Failure> {
        let Records { client, kind, more, pages, walks } = self;
        let before = pages.version();
        walks.walk(|walk| pages.refresh(&mut Reading { client, kind, more: *more }, walk))?;
        Ok(pages.version() != before)
    }

    /// Asks for one record only, to see whether the API knows what is asked for.
    ///
    /// # Errors
    /// It does not, or there is no usable answer.
    pub fn probe(&mut self, more: StateFields) -> Result<(), Failure> {
        self.client.get((self.kind.request)(more, 0, 1), None).map(drop)
    }

    /// The pages as they were read last.
    pub fn pages(&self) -> Pages<T> {
        self.pages.contents().cloned().collect()
    }
}

struct Reading<'a, T> {
    client: &'a mut Client,
    kind: &'a Kind<T>,
    more: StateFields,
}

impl<T> List for Reading<'_, T> {
    type Page = Arc<Vec<T>>;
    type Record<'a> = T;
    const WHAT: &'static str = "records";

    fn source(&mut self) -> &mut dyn Source {
        self.client
    }

    fn request(&self, after: u64, limit: usize) -> Request<'static> {
        (self.kind.request)(self.more, after, limit)
    }

    fn next_id(&self, after: u64) -> Request<'static> {
        (self.kind.next_id)(after)
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
            match (self.kind.read)(raw, &mut shared) {
                Ok(record) => read.push((Some((self.kind.id)(&record)), record)),
                Err(error) => unreadable = Some(error),
            }
        }
        if let Some(error) = unreadable.filter(|_| read.is_empty() && (place.is_full || place.after == 0)) {
            return Err(self.invalid(&format!("none of the {} can be read: {}", self.kind.what, describe(&error))));
        }
        Ok(read)
    }

    fn page(&mut self, records: Vec<(Option<u64>, T)>) -> Result<(Self::Page, usize), Failure> {
        let size = records.len() * size_of::<T>();
        let records: Vec<T> = records.into_iter().map(|(_, record)| record).collect();
        Ok((records.into(), size))
    }

    fn invalid(&mut self, why: &str) -> Failure {
        let (api, what) = (self.client.url(), self.kind.what);
        Failure::new(Reason::BadAnswer, format!("the answer of {api} is no page of {what}: {why}"))
    }
}
