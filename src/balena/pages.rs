//! Paging: records come by ascending id, page by page, and an unchanged page is not downloaded again.

use super::failure::Failure;
use super::request::Answer;

/// Records in a page. 5,030 devices came in one 4.9 MB answer from a real server; smaller pages change less often.
pub const PAGE_SIZE: usize = 1000;
/// The smallest limit of a page ahead of need. A page with fewer records has a few large ones, and becomes smaller only once its answer
/// is too large: each page is a request, and a few hostile devices must not make many.
const SMALL_PAGE: usize = PAGE_SIZE / 16;
/// The most pages that are kept, whatever the server sends: a million records.
const MAX_PAGES: usize = 1000;
/// The most bytes that are kept, whatever the server sends.
const MAX_SIZE: usize = 1 << 30;

/// Asks for pages and reads them.
pub trait Reader<T> {
    /// Asks for up to `limit` records with ids above `after`, unless that page still has this `ETag`.
    ///
    /// # Errors
    /// The request fails.
    fn ask(&mut self, after: u64, limit: usize, etag: Option<&str>) -> Result<Answer, Failure>;

    /// Whether a page that the API has not changed is still right. If it is not, it is downloaded again.
    fn is_current(&self, _page: &T) -> bool {
        true
    }

    /// Reads a page.
    ///
    /// # Errors
    /// The body is not a page.
    fn read(&mut self, body: &[u8], place: Place<'_, T>) -> Result<Read<T>, Failure>;

    /// Makes the page for a single record that is larger than an answer can be.
    ///
    /// # Errors
    /// The record cannot be skipped.
    fn too_large(&mut self, after: u64) -> Result<Read<T>, Failure>;

    /// The failure for an answer that is not what was asked for.
    fn invalid(&self, why: &str) -> Failure;
}

/// Where a page belongs.
#[derive(Clone, Copy)]
pub struct Place<'a, T> {
    /// Its records have ids above this.
    pub after: u64,
    /// Records that were asked for. Fewer mean that it is the last page.
    pub limit: usize,
    /// What was read there before.
    pub old: Option<&'a T>,
    /// Where the next page began before. A page that ends there again leaves the next ones unchanged.
    pub next: Option<u64>,
}

/// A page that was read.
pub struct Read<T> {
    /// What was read.
    pub content: T,
    /// The last id that it covers; none if it covers the rest.
    pub end: Option<u64>,
    /// Bytes that it keeps in memory.
    pub size: usize,
}

/// The pages as they were read last.
pub struct Pages<T> {
    pages: Vec<Page<T>>,
}

struct Page<T> {
    after: u64,
    /// How many records this page asks for the next time.
    limit: usize,
    /// How many records a new page behind it asks for.
    next_limit: usize,
    etag: Option<String>,
    read: Read<T>,
}

impl<T> Default for Pages<T> {
    fn default() -> Self {
        Pages { pages: Vec::new() }
    }
}

impl<T> Pages<T> {
    /// What the pages hold, in order.
    pub fn contents(&self) -> impl Iterator<Item = &T> {
        self.pages.iter().map(|page| &page.read.content)
    }

    /// Asks for every page and calls `changed` for each that is new.
    ///
    /// # Errors
    /// A request or a page fails. The pages may then be of two moments, and must not be used. Those that came are kept, so that the
    /// next try is cheaper.
    pub fn refresh(&mut self, reader: &mut impl Reader<T>, mut changed: impl FnMut()) -> Result<(), Failure> {
        let mut index = 0;
        let mut after = 0;
        let mut size = 0;
        loop {
            if let Some(page) = self.fetch(index, after, reader)? {
                // The new page replaces all old ones that begin within it.
                let within = |old: &Page<T>| page.read.end.is_none_or(|end| old.after < end);
                let replaced = self.pages[index..].iter().take_while(|old| within(old)).count();
                self.pages.splice(index..index + replaced, [page]);
                changed();
            }
            let read = &self.pages[index].read;
            size += read.size;
            match read.end {
                None => return Ok(()),
                Some(end) if end > after && index + 1 < MAX_PAGES && size < MAX_SIZE => {
                    index += 1;
                    after = end;
                }
                Some(_) => return Err(reader.invalid("it goes on without end")),
            }
        }
    }

    /// The page that begins after `after`, or none if the one kept at `index` has not changed.
    fn fetch(&self, index: usize, after: u64, reader: &mut impl Reader<T>) -> Result<Option<Page<T>>, Failure> {
        let old = self.pages.get(index).filter(|old| old.after == after);
        let before = index.checked_sub(1).map(|before| &self.pages[before]);
        let mut limit = match (old, before) {
            (Some(old), _) => old.limit,
            (None, Some(before)) => before.next_limit,
            (None, None) => PAGE_SIZE,
        };
        let current = old.filter(|old| reader.is_current(&old.read.content));
        let mut etag = current.and_then(|old| old.etag.as_deref());
        loop {
            match reader.ask(after, limit, etag)? {
                Answer::Unchanged => return Ok(None),
                Answer::Body { etag, body, room } => {
                    let old = self.pages.get(index).map(|old| &old.read.content);
                    let next = self.pages.iter().map(|old| old.after).find(|next| *next > after);
                    let read = reader.read(&body, Place { after, limit, old, next })?;
                    let (limit, next_limit) = limits(limit, room);
                    return Ok(Some(Page { after, limit, next_limit, etag, read }));
                }
                Answer::TooLarge { .. } if limit > 1 => (limit, etag) = (limit / 2, None),
                Answer::TooLarge { etag } => {
                    let read = reader.too_large(after)?;
                    return Ok(Some(Page { after, limit, next_limit: SMALL_PAGE, etag, read }));
                }
            }
        }
    }
}

/// How many records a page with this limit asks for the next time, and how many a new page behind it: as many as take half of the
/// largest answer. So a page becomes smaller before its answer is too large, which would be read in vain.
fn limits(limit: usize, room: usize) -> (usize, usize) {
    let fitting = (limit.saturating_mul(room) / 2).clamp(SMALL_PAGE, PAGE_SIZE);
    (limit.min(fitting), fitting)
}
