//! The labels of services of the releases that devices run: which releases are asked for, and when.

use std::collections::{BTreeSet, HashMap};
use std::mem;
use std::sync::Arc;

use serde_json::value::RawValue;

use super::service_labels::{Declared, declared};
use crate::balena::device::{self, describe, records};
use crate::balena::{Failure, Fetched, List, Listing, Pages, Place, Reason, ReleaseServices, Request, Source, WithId};

/// Ids in one request: the API refuses a URL of more than 15,000 bytes.
const MAX_IDS: usize = 500;

/// What the running releases declare. An unchanged release keeps its [`Declared`], so that a comparison of pointers tells
/// whether a device has to be mapped again.
#[derive(Default)]
pub struct Releases {
    pages: Pages<Vec<Arc<Declared>>>,
    by_release: HashMap<u64, Arc<Declared>>,
    /// The answer of a server that does not know releases.
    missing: Option<Failure>,
}

impl Releases {
    pub fn get(&self, release: u64) -> Option<&Arc<Declared>> {
        self.by_release.get(&release)
    }

    /// Rises when a release declares something else.
    pub fn version(&self) -> u64 {
        self.pages.version()
    }

    pub fn warnings(&self) -> impl Iterator<Item = &str> {
        let missing = self.missing.as_ref().map(|_| {
            "this server does not know releases: labels of services are not read; set --service-labels=false \
             (SERVICE_LABELS=false) to stop asking for them"
        });
        let declared = self.pages.contents().flatten();
        declared.flat_map(|declared| &declared.warnings).map(String::as_str).chain(missing)
    }

    /// The failure, if the server does not know releases: for a list that had targets by their labels.
    pub fn missing(&self) -> Option<Failure> {
        self.missing.clone().map(explained)
    }

    /// Asks for the releases that the selected fleets' devices run.
    ///
    /// # Errors
    /// The request fails. Only 404 before the first success means that there are no labels: a stopped database answers 401 or
    /// 500.
    pub fn refresh(&mut self, source: &mut dyn Source) -> Result<(), Failure> {
        let mut pages = mem::take(&mut self.pages);
        let outcome = pages.refresh(source, self);
        self.pages = pages;
        match outcome {
            Ok(()) => self.missing = None,
            // A load balancer may answer 404 for a moment. Labels that were read before are not gone for that.
            Err(failure) if failure.reason == Reason::NotFound && self.by_release.is_empty() => {
                self.missing = Some(failure);
            }
            // A wrong key or a stopped database is not about labels: no device can be read either.
            Err(failure) if failure.is_of_this_request() => {
                let page = Request::Page { list: Listing::Devices, after: 0, limit: 1 };
                return Err(match source.get(page, None)? {
                    Fetched::Body { body, .. } if records(&body).is_err() => failure,
                    _ => explained(failure),
                });
            }
            Err(failure) => return Err(failure),
        }
        let declared = self.pages.contents().flatten();
        self.by_release = declared.map(|declared| (declared.release, declared.clone())).collect();
        Ok(())
    }

    /// Asks for releases that devices run and that the last answer did not hold: they started in between.
    ///
    /// # Errors
    /// The request fails, or the API does not know one of the releases. They are never read as releases without labels.
    pub fn fetch(&mut self, source: &mut dyn Source, releases: BTreeSet<u64>) -> Result<(), Failure> {
        let unknown: Vec<u64> = releases.into_iter().filter(|id| !self.by_release.contains_key(id)).collect();
        if unknown.is_empty() || self.missing.is_some() {
            return Ok(());
        }
        for ids in unknown.chunks(MAX_IDS) {
            for declared in self.named(source, ids).map_err(explained)? {
                self.by_release.insert(declared.release, declared);
            }
        }
        match unknown.iter().find(|id| !self.by_release.contains_key(id)) {
            Some(id) => {
                let why = format!("a device runs release {id}, and the API does not list it");
                Err(explained(self.invalid(source, &why)))
            }
            None => Ok(()),
        }
    }

    /// The releases with these ids.
    fn named(&self, source: &mut dyn Source, ids: &[u64]) -> Result<Vec<Arc<Declared>>, Failure> {
        let answer = source.get(Request::ReleasesById(ids), None)?;
        let Fetched::Body { body, .. } = answer else { return Err(self.invalid(source, "it is too large")) };
        let records = records(&body).map_err(|error| self.invalid(source, &describe(&error)))?;
        records.into_iter().map(|raw| self.release(source, raw)).collect()
    }

    /// Reads a release. An unchanged one keeps its [`Declared`].
    fn release(&self, source: &dyn Source, raw: &RawValue) -> Result<Arc<Declared>, Failure> {
        let which = || device::id(raw).map_or("a release without an id".into(), |id| format!("release {id}"));
        let bad = |error| self.invalid(source, &format!("{} cannot be read: {}", which(), describe(&error)));
        let release: ReleaseServices = device::read(raw).map_err(bad)?;
        let declared = declared(&release);
        let known = self.by_release.get(&declared.release).filter(|known| ***known == declared);
        Ok(known.cloned().unwrap_or_else(|| declared.into()))
    }
}

impl List for Releases {
    type Page = Vec<Arc<Declared>>;
    type Record<'a> = Arc<Declared>;

    fn listing(&self) -> Listing {
        Listing::Releases
    }

    fn read(
        &mut self, source: &dyn Source, records: Vec<&RawValue>, _: &Place<'_, Self::Page>,
    ) -> Result<Vec<WithId<Arc<Declared>>>, Failure> {
        let read = |raw| self.release(source, raw).map(|declared| (Some(declared.release), declared));
        records.into_iter().map(read).collect()
    }

    fn page(&mut self, _: &mut dyn Source, declared: Vec<WithId<Arc<Declared>>>) -> Result<Self::Page, Failure> {
        Ok(declared.into_iter().map(|(_, declared)| declared).collect())
    }
}

/// Says how to go on without labels: devices can be read.
fn explained(failure: Failure) -> Failure {
    if !failure.is_of_this_request() {
        return failure;
    }
    let why = match failure.status {
        Some(status @ (401 | 403)) => format!("the key may read devices, but not releases (the API answers {status})"),
        _ => failure.message,
    };
    let message = format!(
        "cannot read the labels of services: {why}; --service-labels=false (SERVICE_LABELS=false) turns this request off"
    );
    Failure { message, ..failure }
}
