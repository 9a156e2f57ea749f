//! The page for people, in plain HTML without scripts. It is made row by row, with what is wrong first.

mod head;
mod row;
pub mod view;
pub mod wanted;

use std::collections::BTreeMap;
use std::io::{Result, Write as _};
use std::mem;

use super::device_metrics::{Known, find};
use super::stream::Source;
use crate::discovery::entry::Entry;
use head::Fleet;
pub use head::REFRESH;
use row::{matches, slug};
use view::View;
use wanted::Wanted;

/// The style sheet. A content security policy allows it by its place, `/style.css`.
pub const STYLE: &str = include_str!("style.css");
/// Rows of a table, unless all are asked for.
const MAX_ROWS: usize = 500;

/// The tables of devices, those with a problem first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Section {
    LeftOut,
    Offline,
    Listed,
}

impl Section {
    const ALL: [Section; 3] = [Section::LeftOut, Section::Offline, Section::Listed];

    fn of(entry: &Entry, state: Option<Known>) -> Self {
        match state.and_then(Known::online) {
            _ if entry.left_out.is_some() => Section::LeftOut,
            Some(false) => Section::Offline,
            _ => Section::Listed,
        }
    }

    /// Id, title and the heading of the last column.
    fn titles(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Section::LeftOut => ("left-out", "Left out", "Why"),
            Section::Offline => ("offline", "Offline", "Targets"),
            Section::Listed => ("listed", "Listed", "Targets"),
        }
    }
}

/// The page, row by row.
pub struct Page {
    view: View,
    words: Vec<String>,
    /// How many devices the filter leaves in each section.
    counts: BTreeMap<Section, usize>,
    head: Vec<u8>,
    /// The sections that are to come, the next one first.
    sections: &'static [Section],
    /// Rows of this section so far.
    rows: usize,
    /// The next device of the list, and the place in the states.
    at: [(usize, usize); 2],
}

impl Page {
    /// Counts the devices and makes all that comes before the tables.
    pub fn new(view: View) -> Self {
        let words = view.wanted.words();
        let mut counts = BTreeMap::<Section, usize>::new();
        let mut fleets = BTreeMap::<&str, Fleet>::new();
        let mut total = Fleet::default();
        let mut at = (0, 0);
        for entry in view.list.entries() {
            let state = find(&view.states, &mut at, entry.id);
            for fleet in [&mut total, fleets.entry(slug(entry)).or_default()] {
                fleet.devices += 1;
                fleet.targets += entry.targets;
                fleet.left_out += usize::from(entry.left_out.is_some());
                fleet.offline += usize::from(state.and_then(Known::online) == Some(false));
            }
            if matches(entry, state, &words) {
                *counts.entry(Section::of(entry, state)).or_default() += 1;
            }
        }
        let mut head = Vec::new();
        let _ = view.write_head(&mut head, &total, &fleets, counts.values().sum()); // into memory: cannot fail
        Page { view, words, counts, head, sections: &Section::ALL, rows: 0, at: <_>::default() }
    }

    /// The next row of a section, or none at its end.
    fn row(&mut self, section: Section, out: &mut Vec<u8>) -> Option<Result<()>> {
        if self.rows >= MAX_ROWS && !self.view.wanted.all {
            return None;
        }
        let entry = self.view.list.next(&mut self.at[0])?;
        let state = find(&self.view.states, &mut self.at[1], entry.id);
        if Section::of(entry, state) != section || !matches(entry, state, &self.words) {
            return Some(Ok(()));
        }
        self.rows += 1;
        Some(self.view.write_row(out, entry, state))
    }
}

impl Source for Page {
    fn append(&mut self, out: &mut Vec<u8>) -> bool {
        out.append(&mut mem::take(&mut self.head));
        let Some((section, rest)) = self.sections.split_first() else {
            let _ = writeln!(out, "</main>\n</body>\n</html>");
            return false;
        };
        let is_first = self.at[0] == (0, 0);
        let count = self.counts.get(section).copied().unwrap_or_default();
        // Writing into memory cannot fail.
        if count > 0 && is_first {
            let (id, title, column) = section.titles();
            let _ = write!(
                out,
                "<section aria-labelledby=\"{id}\">\n<h2 id=\"{id}\">{title} <span class=\"soft\">({count})</span></h2>\n\
                 <table class=\"devices\">\n<thead><tr><th scope=\"col\">Device<th scope=\"col\">In balenaCloud\
                 <th scope=\"col\">{column}</thead>\n<tbody>\n"
            );
        }
        if count == 0 || self.row(*section, out).is_none() {
            if count > 0 {
                let _ = writeln!(out, "</tbody>\n</table>");
            }
            if count > self.rows {
                let all = Wanted { all: true, ..self.view.wanted.clone() }.link();
                let _ = writeln!(
                    out,
                    "<p>{} more: use the filter, or <a href=\"{all}\">show all rows</a>.</p>",
                    count - self.rows
                );
            }
            if count > 0 {
                let _ = writeln!(out, "</section>");
            }
            self.sections = rest;
            self.rows = 0;
            self.at = <_>::default();
        }
        true
    }
}
