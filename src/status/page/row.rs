//! The row of a device, and whether the filter leaves it.

use std::borrow::Cow;
use std::io::{Result, Write};
use std::time::{Duration, UNIX_EPOCH};

use html_escape::encode_text;

use super::view::View;
use crate::discovery::entry::Entry;
use crate::discovery::labels::{JOB, METRICS_PATH, SERVICE};
use crate::discovery::target::{ReadGroup, read_groups};
use crate::status::device_metrics::Known;

impl View {
    /// Writes the row of a device.
    ///
    /// # Errors
    /// `out` fails.
    pub fn write_row(&self, out: &mut Vec<u8>, entry: &Entry, state: Option<Known>) -> Result<()> {
        let (name, fleet) = (encode_text(&entry.name), encode_text(slug(entry)));
        write!(out, "<tr><td><bdi>{name}</bdi> <small>{fleet}</small><td>")?;
        self.write_state(out, state)?;
        write!(out, "<td>")?;
        if let Some(left_out) = &entry.left_out {
            write!(out, "{}", encode_text(&left_out.to_string()))?;
        }
        for group in read_groups(&entry.text) {
            let address = encode_text(&group.targets[0]);
            let path = encode_text(group.label(METRICS_PATH).unwrap_or_default());
            let origin = origin(entry, &group);
            let origin = encode_text(&origin);
            let job = group.label(JOB).map_or("without a name".into(), encode_text);
            write!(out, "<div>{job} <span class=\"soft\">from {origin}</span> <small>{address}{path}</small></div>")?;
        }
        writeln!(out)
    }

    fn write_state(&self, out: &mut Vec<u8>, state: Option<Known>) -> Result<()> {
        let Some(state) = state else { return write!(out, "<span class=\"soft\">unknown</span>") };
        let (class, word) = word(state);
        write!(out, "<span class=\"{class}\">{word}</span>")?;
        if let Some(since) = state.since() {
            let since = UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(since).unwrap_or_default());
            write!(out, " <small>since {}</small>", since.map_or("?".into(), |since| self.ago(since)))?;
        }
        if let Some(heartbeat) = state.heartbeat().filter(|heartbeat| *heartbeat != word) {
            write!(out, " <small>heartbeat: {}</small>", encode_text(heartbeat))?;
        }
        if state.update_pending() {
            write!(out, " <small class=\"note\">update pending</small>")?;
        }
        Ok(())
    }
}

/// The class of its style, and the word for what balenaCloud sees.
fn word(state: Known) -> (&'static str, &'static str) {
    match state.online() {
        Some(true) => ("good", "online"),
        Some(false) => ("bad", "offline"),
        None => ("soft", "unknown"),
    }
}

/// The slug of its fleet.
pub fn slug(entry: &Entry) -> &str {
    entry.fleet.as_ref().map(|fleet| &*fleet.slug).filter(|slug| !slug.is_empty()).unwrap_or("no fleet")
}

/// Whether what the page shows of a device has all of these words.
pub fn matches(entry: &Entry, state: Option<Known>, words: &[String]) -> bool {
    if words.is_empty() {
        return true;
    }
    let left_out = entry.left_out.as_ref().map_or(String::new(), |why| format!("left out {why}"));
    let groups: Vec<_> = read_groups(&entry.text).collect();
    let targets = groups.iter().flat_map(|group| {
        let shown = [Some(&*group.targets[0]), group.label(JOB), group.label(METRICS_PATH)];
        shown.into_iter().flatten().map(Cow::Borrowed).chain([origin(entry, group)])
    });
    let state_words = state.map(|state| (word(state).1, state.heartbeat().unwrap_or_default(), state.update_pending()));
    let (online, heartbeat, pending) = state_words.unwrap_or(("unknown", "", false));
    let pending = if pending { "update pending" } else { "" };
    let shown = [&entry.name, entry.uuid().unwrap_or_default(), slug(entry), online, heartbeat, pending, &left_out];
    let shown: Vec<String> =
        shown.into_iter().map(Cow::Borrowed).chain(targets).map(|text| text.to_lowercase()).collect();
    words.iter().all(|word| shown.iter().any(|text| text.contains(word)))
}

/// Where the exporter of a target comes from, in the words of `check`.
fn origin(entry: &Entry, group: &ReadGroup) -> Cow<'static, str> {
    group.label(SERVICE).map_or(entry.origin.as_str().into(), |service| format!("service {service}").into())
}
