//! The page for people, in plain HTML without scripts. It is made row by row, with what is wrong first.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use html_escape::{encode_double_quoted_attribute, encode_text};
use hyper::Uri;
use reqwest::Url;

use super::List;
use super::device_metrics::{Known, States, find};
use super::stream::Source;
use crate::discovery::exporter;
use crate::discovery::inventory::Entry;
use crate::discovery::labels::{JOB, METRICS_PATH};
use crate::discovery::target::{ReadGroup, read_groups};
use crate::logging::count;

/// The style sheet. A content security policy allows it by its place, `/style.css`.
pub const STYLE: &str = include_str!("page.css");
/// The page loads itself again after so many seconds.
pub const REFRESH: &str = "30";

/// Rows of a table, unless all are asked for.
const MAX_ROWS: usize = 500;
/// Characters of a filter.
const MAX_FILTER_LENGTH: usize = 200;

/// What is asked of the page, in its query.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Only devices with all of these words in what the page shows of them.
    filter: String,
    /// All rows, not only the first ones.
    all: bool,
    /// It does not load itself again.
    pub stays: bool,
}

impl Wanted {
    /// Reads the query of a request. What it does not know, it ignores.
    pub fn of(uri: &Uri) -> Self {
        let mut wanted = Wanted::default();
        let url =
            Url::parse("http://localhost/").and_then(|base| base.join(&format!("?{}", uri.query().unwrap_or(""))));
        let Ok(url) = url else { return wanted };
        for (name, value) in url.query_pairs() {
            match &*name {
                "q" => wanted.filter = value.trim().chars().take(MAX_FILTER_LENGTH).collect(),
                "rows" => wanted.all = value == "all",
                "refresh" => wanted.stays = value == "off",
                _ => {}
            }
        }
        wanted
    }

    /// The link to this, as an attribute's value.
    fn link(&self) -> String {
        let Ok(mut url) = Url::parse("http://localhost/") else { return "/".into() };
        if !self.filter.is_empty() {
            url.query_pairs_mut().append_pair("q", &self.filter);
        }
        for (name, value, is_set) in [("rows", "all", self.all), ("refresh", "off", self.stays)] {
            if is_set {
                url.query_pairs_mut().append_pair(name, value);
            }
        }
        let link = url.query().map_or("/".into(), |query| format!("/?{query}"));
        encode_double_quoted_attribute(&link).into_owned()
    }

    fn words(&self) -> Vec<String> {
        self.filter.to_lowercase().split_whitespace().map(str::to_owned).collect()
    }
}

/// What the page shows.
pub struct View {
    /// `well`, `starting`, `failing` or `stuck`.
    pub state: &'static str,
    /// What is wrong, one sentence each.
    pub problems: Vec<String>,
    /// When the last successful refresh ended.
    pub refreshed: Option<SystemTime>,
    /// The last good list.
    pub list: Arc<List>,
    /// The state of the devices, as far as it is known.
    pub states: Vec<Arc<States>>,
    /// What is asked for.
    pub wanted: Wanted,
    /// The present.
    pub now: SystemTime,
}

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

/// The devices of a fleet.
#[derive(Default)]
struct Fleet {
    devices: usize,
    offline: usize,
    targets: usize,
    left_out: usize,
}

impl Page {
    /// Counts the devices and makes all that comes before the tables.
    pub fn new(view: View) -> Self {
        let words = view.wanted.words();
        let (mut counts, mut fleets) = (BTreeMap::<Section, usize>::new(), BTreeMap::<&str, Fleet>::new());
        let (mut total, mut at) = (Fleet::default(), (0, 0));
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
    fn row(&mut self, section: Section, out: &mut Vec<u8>) -> Option<std::io::Result<()>> {
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
        let (is_first, count) = (self.at[0] == (0, 0), self.counts.get(section).copied().unwrap_or_default());
        // all of it goes into memory and cannot fail
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
            (self.sections, self.rows, self.at) = (rest, 0, <_>::default());
        }
        true
    }
}

impl View {
    fn write_head(
        &self, out: &mut Vec<u8>, total: &Fleet, fleets: &BTreeMap<&str, Fleet>, found: usize,
    ) -> std::io::Result<()> {
        let state = self.state;
        let class = if state == "well" { "good" } else { "bad" };
        let refreshed = self.refreshed.map_or("never".into(), |time| self.ago(time));
        write!(
            out,
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>baletheus: {state}</title>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<link rel=\"icon\" href=\"data:,\">\n\
             <link rel=\"stylesheet\" href=\"/style.css\">\n</head>\n<body>\n<header>\n<h1>Baletheus</h1>\n\
             <p class=\"state\">State: <strong class=\"{class}\">{state}</strong>. Last successful refresh: {refreshed}.</p>\n\
             </header>\n<main>\n"
        )?;
        if !self.problems.is_empty() {
            writeln!(out, "<div class=\"problems\" role=\"status\">")?;
            for problem in &self.problems {
                writeln!(out, "<p>{}</p>", encode_text(problem))?;
            }
            writeln!(out, "</div>")?;
        }
        writeln!(out, "<dl>")?;
        for (name, number) in [("Devices", total.devices), ("Targets", total.targets)] {
            writeln!(out, "<div><dt>{name}</dt><dd>{number}</dd></div>")?;
        }
        for (name, number) in [("Offline", total.offline), ("Left out", total.left_out)] {
            let link = Wanted { filter: name.to_lowercase(), all: false, stays: self.wanted.stays }.link();
            let linked = if number > 0 { format!("<a href=\"{link}\">{number}</a>") } else { "0".into() };
            writeln!(out, "<div><dt>{name}</dt><dd>{linked}</dd></div>")?;
        }
        writeln!(out, "</dl>")?;
        if fleets.len() > 1 || !self.wanted.filter.is_empty() {
            self.write_fleets(out, fleets)?;
        }
        self.write_controls(out, total, found)
    }

    fn write_fleets(&self, out: &mut Vec<u8>, fleets: &BTreeMap<&str, Fleet>) -> std::io::Result<()> {
        write!(
            out,
            "<section aria-labelledby=\"fleets\">\n<h2 id=\"fleets\">Fleets <span class=\"soft\">({})</span></h2>\n<table>\n\
             <thead><tr><th scope=\"col\">Fleet",
            fleets.len()
        )?;
        for title in ["Devices", "Targets", "Offline", "Left out"] {
            write!(out, "<th scope=\"col\" class=\"number\">{title}")?;
        }
        writeln!(out, "</thead>\n<tbody>")?;
        for (slug, fleet) in fleets {
            let link = Wanted { filter: (*slug).to_owned(), all: false, stays: self.wanted.stays }.link();
            write!(out, "<tr><th scope=\"row\"><a href=\"{link}\">{}</a>", encode_text(slug))?;
            for (number, class) in
                [(fleet.devices, ""), (fleet.targets, ""), (fleet.offline, " note"), (fleet.left_out, " note")]
            {
                let class = if number > 0 { class } else { "" };
                write!(out, "<td class=\"number{class}\">{number}")?;
            }
            writeln!(out)?;
        }
        writeln!(out, "</tbody>\n</table>\n</section>")
    }

    fn write_controls(&self, out: &mut Vec<u8>, total: &Fleet, found: usize) -> std::io::Result<()> {
        let filter = encode_double_quoted_attribute(&self.wanted.filter);
        write!(
            out,
            "<form role=\"search\" action=\"/\" method=\"get\">\n<label for=\"q\">Filter</label>\n\
             <input id=\"q\" name=\"q\" type=\"search\" value=\"{filter}\" placeholder=\"offline, a name, a uuid, a fleet\">\n"
        )?;
        if self.wanted.stays {
            writeln!(out, "<input type=\"hidden\" name=\"refresh\" value=\"off\">")?;
        }
        writeln!(out, "<button>Show</button>\n</form>")?;
        let stays = Wanted { stays: !self.wanted.stays, ..self.wanted.clone() }.link();
        write!(out, "<p class=\"soft\">")?;
        if !self.wanted.filter.is_empty() {
            let clear = Wanted { filter: String::new(), ..self.wanted.clone() }.link();
            let all = total.devices;
            write!(out, "{found} of {} match. <a href=\"{clear}\">Show all</a>. ", count(all, "device"))?;
        }
        if self.wanted.stays {
            write!(out, "This page stays as it is. <a href=\"{stays}\">Refresh it every {REFRESH} s</a>.")?;
        } else {
            write!(out, "This page refreshes every {REFRESH} s. <a href=\"{stays}\">Stop that</a>.")?;
        }
        writeln!(
            out,
            " <a href=\"/metrics\">Metrics</a>, <a href=\"/targets\">targets as JSON</a>. Version {}.</p>",
            env!("CARGO_PKG_VERSION")
        )
    }

    fn write_row(&self, out: &mut Vec<u8>, entry: &Entry, state: Option<Known>) -> std::io::Result<()> {
        let (name, fleet) = (encode_text(&entry.name), encode_text(slug(entry)));
        write!(out, "<tr><td><bdi>{name}</bdi> <small>{fleet}</small><td>")?;
        self.write_state(out, state)?;
        write!(out, "<td>")?;
        if let Some(left_out) = &entry.left_out {
            write!(out, "{}", encode_text(&left_out.to_string()))?;
        }
        for group in read_groups(&entry.text) {
            let address = encode_text(&group.targets[0]);
            let (path, source) = (encode_text(group.label(METRICS_PATH).unwrap_or_default()), source(&group));
            let job = group.label(JOB).map_or("without a name".into(), encode_text);
            write!(out, "<div>{job} <span class=\"soft\">by {source}</span> <small>{address}{path}</small></div>")?;
        }
        writeln!(out)
    }

    fn write_state(&self, out: &mut Vec<u8>, state: Option<Known>) -> std::io::Result<()> {
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

    /// A moment by its distance from the present.
    fn ago(&self, time: SystemTime) -> String {
        let distance = self.now.duration_since(time).unwrap_or_default();
        let exact = humantime::format_rfc3339_seconds(time);
        format!("<time datetime=\"{exact}\" title=\"{exact}\">{} ago</time>", about(distance))
    }
}

/// A duration in its largest unit.
pub fn about(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// Its class and the word for what balenaCloud sees.
fn word(state: Known) -> (&'static str, &'static str) {
    match state.online() {
        Some(true) => ("good", "online"),
        Some(false) => ("bad", "offline"),
        None => ("soft", "unknown"),
    }
}

fn slug(entry: &Entry) -> &str {
    entry.fleet.as_ref().map(|fleet| &*fleet.slug).filter(|slug| !slug.is_empty()).unwrap_or("no fleet")
}

/// Whether what the page shows of a device has all of these words.
fn matches(entry: &Entry, state: Option<Known>, words: &[String]) -> bool {
    if words.is_empty() {
        return true;
    }
    let left_out = entry.left_out.as_ref().map_or(String::new(), |why| format!("left out {why}"));
    let targets = String::from_utf8_lossy(&entry.text);
    let targets: Vec<_> = if targets.is_empty() { Vec::new() } else { read_groups(&entry.text).collect() };
    let targets = targets.iter().flat_map(|group| {
        [Some(&*group.targets[0]), group.label(JOB), group.label(METRICS_PATH)].into_iter().flatten()
    });
    let state_words = state.map(|state| (word(state).1, state.heartbeat().unwrap_or_default(), state.update_pending()));
    let (online, heartbeat, pending) = state_words.unwrap_or(("unknown", "", false));
    let pending = if pending { "update pending" } else { "" };
    let shown = [&entry.name, entry.uuid().unwrap_or_default(), slug(entry), online, heartbeat, pending, &left_out];
    let shown: Vec<Cow<str>> = shown.into_iter().chain(targets).map(|text| text.to_lowercase().into()).collect();
    words.iter().all(|word| shown.iter().any(|text| text.contains(word)))
}

/// What asks for the exporter of a target: a tag that names it, or else an option.
fn source(group: &ReadGroup) -> &'static str {
    let names_it = |label: &str| {
        let list = group.label(label).and_then(|tag| exporter::parse_list(tag).ok()).unwrap_or_default();
        list.iter().any(|exporter| {
            let port = group.targets[0].rsplit_once(':').and_then(|(_, port)| port.parse().ok());
            let is_public = port == Some(443);
            exporter.name.as_deref() == group.label(JOB)
                && exporter.path.as_deref() == group.label(METRICS_PATH)
                && (is_public || Some(exporter.port) == port)
        })
    };
    if names_it("__meta_balena_tag_prometheus_io_exporters") {
        "its tag"
    } else if names_it("__meta_balena_fleet_tag_prometheus_io_exporters") {
        "its fleet's tag"
    } else {
        "the options"
    }
}
