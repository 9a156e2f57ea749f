//! Paging: records come by ascending id, page by page, and an unchanged page is not downloaded again.

use std::time::{Duration, Instant};

use serde_json::value::RawValue;

use super::device::{self, describe, records};
use super::failure::{Failure, Reason};
use super::query::{Listing, Request};
use super::source::{Fetched, Source};

/// Records in a page. 5,030 devices came in one 4.9 MB answer from a real server; smaller pages change less often.
pub const PAGE_SIZE: usize = 1000;
/// The smallest limit of a page ahead of need. A page with fewer records has a few large ones, and becomes smaller only once its
/// answer is too large: each page is a request, and a few hostile devices must not make many.
const SMALL_PAGE: usize = PAGE_SIZE / 16;
/// The most records, whatever the server sends.
const MAX_RECORDS: usize = 1_000_000;
/// The most bytes of all answers, whatever the server sends: less than that is kept of them.
const MAX_SIZE: usize = 1 << 30;

/// How long a walk may take. Its first pages are that old then.
const MAX_WALK: Duration = Duration::from_secs(3600);

/// A record with its id, if it has one.
pub type WithId<R> = (Option<u64>, R);

/// A list that comes in pages, and what is made of its records.
pub trait List {
    type Page;
    type Record<'a>;

    /// What the pages are a part of.
    fn listing(&self) -> Listing;

    /// Whether a page that the API has not changed is still right. If it is not, it is downloaded again.
    fn is_current(&self, _page: &Self::Page) -> bool {
        true
    }

    /// Reads records, each with its id if it has one.
    ///
    /// # Errors
    /// A record cannot be used, and the page not without it.
    fn read<'a>(
        &mut self, source: &dyn Source, records: Vec<&'a RawValue>, place: &Place<'_, Self::Page>,
    ) -> Result<Vec<WithId<Self::Record<'a>>>, Failure>;

    /// Makes a page of records.
    ///
    /// # Errors
    /// The page lacks something that another request does not give.
    fn page(&mut self, source: &mut dyn Source, records: Vec<WithId<Self::Record<'_>>>) -> Result<Self::Page, Failure>;

    /// Makes the page for a single record that is larger than an answer can be. Gives its id, too.
    ///
    /// # Errors
    /// The record cannot be skipped.
    fn too_large(&mut self, source: &mut dyn Source, after: u64) -> Result<(u64, Self::Page), Failure> {
        Err(self.invalid(source, &format!("what follows id {after} is too large")))
    }

    /// The failure for an answer that is not what was asked for.
    fn invalid(&self, source: &dyn Source, why: &str) -> Failure {
        let (what, api) = (self.listing().what(), source.name());
        let message = format!("the answer of {api} is no page of {what}: {why}; is --api-url (API_URL) right?");
        Failure::new(Reason::BadAnswer, message)
    }
}

/// Where a page belongs.
pub struct Place<'a, T> {
    /// Its records have ids above this.
    pub after: u64,
    /// Whether there may be more records behind it.
    pub is_full: bool,
    /// What was read there before.
    pub old: Option<&'a T>,
}

/// The pages of a list as they were read last.
#[derive(Default)]
pub struct Pages<T> {
    cached: Vec<CachedPage<T>>,
    version: u64,
    /// The number of walks over the pages.
    walk: u64,
    /// When the walk began that has not ended.
    began: Option<Instant>,
    /// How many records this server puts into an answer, if that is fewer than it is asked for.
    server_limit: Option<usize>,
}

struct CachedPage<T> {
    after: u64,
    /// The walk that has asked for it last.
    walk: u64,
    /// How many records this page asks for the next time.
    limit: usize,
    /// How many records a new page behind it asks for.
    next_limit: usize,
    etag: Option<String>,
    content: T,
    /// How many records the answer held.
    count: usize,
    /// Bytes of the answer.
    size: usize,
    /// The last id that it covers; none if it covers the rest.
    end: Option<u64>,
}

impl<T> Pages<T> {
    /// What the pages hold, in order.
    pub fn contents(&self) -> impl Iterator<Item = &T> {
        self.cached.iter().map(|page| &page.content)
    }

    /// Rises with each page that changes.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Makes the next walk read every page anew.
    pub fn forget(&mut self) {
        self.cached.clear();
    }

    /// Whether the next walk goes on where a rate limit has stopped the last one.
    pub fn goes_on(&self) -> bool {
        self.began.is_some_and(|began| began.elapsed() <= MAX_WALK)
    }

    /// Walks over all pages. A walk that a rate limit stops goes on at the next try: the pages that it has asked for are not
    /// asked for again, so that it ends where a window holds fewer requests than it needs.
    ///
    /// # Errors
    /// A request or a page fails. The pages may then be of two moments, and must not be used. Those that came are kept, so that
    /// the next try is cheaper.
    pub fn refresh(&mut self, source: &mut dyn Source, list: &mut impl List<Page = T>) -> Result<(), Failure> {
        if !self.goes_on() {
            self.walk += 1;
            self.began = Some(Instant::now());
        }
        let outcome = self.walk(source, list);
        if !matches!(&outcome, Err(failure) if failure.reason == Reason::RateLimited) {
            self.began = None;
        }
        outcome
    }

    /// Asks for every page that this walk has not asked for.
    fn walk(&mut self, source: &mut dyn Source, list: &mut impl List<Page = T>) -> Result<(), Failure> {
        let mut index = 0;
        let mut after = 0;
        let (mut count, mut size) = (0, 0);
        loop {
            let is_there = self.cached.get(index).is_some_and(|known| known.after == after && known.walk == self.walk);
            let new = if is_there { None } else { self.fetch(index, after, source, list)? };
            if let Some(page) = new {
                // The new page replaces all old ones that begin within it.
                let within = |old: &CachedPage<T>| page.end.is_none_or(|end| old.after < end);
                let replaced = self.cached[index..].iter().take_while(|old| within(old)).count();
                self.cached.splice(index..index + replaced, [page]);
                self.version += 1;
            }
            let page = &mut self.cached[index];
            page.walk = self.walk;
            count += page.count;
            size += page.size;
            match page.end {
                None => return Ok(()),
                Some(end) if end > after && count < MAX_RECORDS && size < MAX_SIZE => {
                    index += 1;
                    after = end;
                }
                Some(_) => return Err(list.invalid(source, "it goes on without end")),
            }
        }
    }

    /// The page that begins after `after`, or none if the one kept at `index` has not changed.
    fn fetch(
        &mut self, index: usize, after: u64, source: &mut dyn Source, list: &mut impl List<Page = T>,
    ) -> Result<Option<CachedPage<T>>, Failure> {
        let old = self.cached.get(index).filter(|old| old.after == after);
        let before = index.checked_sub(1).map(|before| &self.cached[before]);
        let mut limit = match (old, before) {
            (Some(old), _) => old.limit,
            (None, Some(before)) => before.next_limit,
            (None, None) => PAGE_SIZE,
        };
        let current = old.filter(|old| list.is_current(&old.content));
        let mut known = current.and_then(|old| old.etag.clone());
        loop {
            let request = Request::Page { list: list.listing(), after, limit };
            match source.get(request, known.as_deref())? {
                Fetched::Unchanged => return Ok(None),
                Fetched::Body { etag, body, room } => {
                    let (content, count, end) = self.read(index, after, limit, &body, source, list)?;
                    let ((limit, next_limit), size) = (limits(limit, room), body.len());
                    return Ok(Some(CachedPage { after, walk: 0, limit, next_limit, etag, content, count, size, end }));
                }
                Fetched::TooLarge { .. } if limit > 1 => (limit, known) = (limit / 2, None),
                Fetched::TooLarge { etag } => {
                    let (end, content) = list.too_large(source, after)?;
                    let (next_limit, count, size, end) = (SMALL_PAGE, 1, 0, Some(end));
                    return Ok(Some(CachedPage { after, walk: 0, limit, next_limit, etag, content, count, size, end }));
                }
            }
        }
    }

    /// Reads an answer: what the page holds, how many records the answer has, and the last id that it covers.
    fn read(
        &mut self, index: usize, after: u64, limit: usize, body: &[u8], source: &mut dyn Source,
        list: &mut impl List<Page = T>,
    ) -> Result<(T, usize, Option<u64>), Failure> {
        let raw = records(body).map_err(|error| list.invalid(source, &describe(&error)))?;
        let count = raw.len();
        let is_full = count >= limit || self.server_limit == Some(count);
        let old = self.cached.get(index).map(|old| &old.content);
        let mut records = list.read(source, raw, &Place { after, is_full, old })?;
        let ids: Vec<u64> = records.iter().filter_map(|(id, _)| *id).collect();
        if ids.first().is_some_and(|first| *first <= after) || !ids.is_sorted() {
            return Err(list.invalid(source, "the ids do not rise"));
        }
        let end = match ids.last() {
            Some(highest) if is_full => {
                let next = self.cached.iter().map(|old| old.after).find(|next| *next > after);
                Some(stable_end(&ids, *highest, next))
            }
            Some(highest) if has_more(source, list, *highest)? => {
                self.server_limit = Some(count);
                Some(*highest)
            }
            None if is_full && count > 0 => return Err(list.invalid(source, "none of its records has an id")),
            _ => None,
        };
        records.retain(|(id, _)| end.is_none() || *id <= end);
        Ok((list.page(source, records)?, count, end))
    }
}

/// Whether there is a record behind this id: a page that is shorter than it was asked for is the last one, unless the server, or
/// a gateway before it, puts fewer records into an answer than it is asked for.
///
/// Nothing is asked behind a page that has not changed. So one hole remains: if a gateway gives exactly as many records as there
/// were when the page was read, a record that comes later is found only once the page itself changes.
fn has_more(source: &mut dyn Source, list: &impl List, highest: u64) -> Result<bool, Failure> {
    let request = Request::NextId(list.listing(), highest);
    let Fetched::Body { body, .. } = source.get(request, None)? else {
        return Err(list.invalid(source, &format!("the id that follows {highest} is too large")));
    };
    let records = records(&body).map_err(|error| list.invalid(source, &describe(&error)))?;
    let ids = records.into_iter().filter_map(device::id);
    // A server that does not know filters sends what it has sent before.
    Ok(ids.max().is_some_and(|id| id > highest))
}

/// Where a full page ends: where it ended before, if it is still at least half full. Otherwise each record that goes would shift
/// every page behind it.
fn stable_end(ids: &[u64], last: u64, next: Option<u64>) -> u64 {
    let Some(next) = next else { return last };
    let kept = ids.iter().take_while(|id| **id <= next).count();
    if kept < ids.len() && kept >= ids.len() / 2 { next } else { last }
}

/// How many records a page with this limit asks for the next time, and how many a new page behind it: as many as take half of the
/// largest answer. So a page becomes smaller before its answer is too large, which would be read in vain.
fn limits(limit: usize, room: usize) -> (usize, usize) {
    let fitting = (limit.saturating_mul(room) / 2).clamp(SMALL_PAGE, PAGE_SIZE);
    (limit.min(fitting), fitting)
}
