//! The page for people, in plain HTML.

use std::fmt::Write as _;
use std::time::SystemTime;

use html_escape::encode_text;

use crate::discovery::inventory::Entry;
use crate::discovery::target::read_groups;

const STYLE: &str = "body{font:16px sans-serif;margin:2em;max-width:60em}table{border-collapse:collapse}\
    th,td{border-bottom:1px solid #ccc;padding:.3em 1em .3em 0;text-align:left;vertical-align:top;overflow-wrap:anywhere}";

/// What the page shows.
pub struct View<'a> {
    /// `well`, `starting`, `failing` or `stuck`.
    pub state: &'static str,
    /// When the last successful refresh ended.
    pub refreshed: Option<SystemTime>,
    /// Why the last refresh failed, if it did.
    pub failure: Option<&'a str>,
    /// The devices of the last good list.
    pub entries: Vec<&'a Entry>,
}

impl View<'_> {
    /// The page.
    pub fn html(&self) -> String {
        let (listed, left_out): (Vec<_>, Vec<_>) = self.entries.iter().copied().partition(|entry| entry.targets > 0);
        let targets: usize = listed.iter().map(|entry| entry.targets).sum();
        let time = |time: SystemTime| humantime::format_rfc3339_seconds(time).to_string();
        let state = self.state;
        let mut page = format!(
            "<!DOCTYPE html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>baletheus: {state}</title>\n\
             <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style>\n<h1>Baletheus</h1>\n<table>\n\
             <tr><th>State<td>{state}\n<tr><th>Last refresh<td>{}\n<tr><th>Last error<td>{}\n\
             <tr><th>Devices<td>{}\n<tr><th>Targets<td>{targets}\n<tr><th>Left out<td>{}\n<tr><th>Version<td>{}\n</table>\n\
             <p><a href=\"/metrics\">metrics</a> <a href=\"/targets\">targets as JSON</a></p>\n",
            self.refreshed.map_or("none yet".into(), time),
            encode_text(self.failure.unwrap_or("none")),
            self.entries.len(),
            left_out.len(),
            env!("CARGO_PKG_VERSION"),
        );
        table(&mut page, "Left out", "Why", &left_out);
        table(&mut page, "Listed", "Targets", &listed);
        page + "</html>\n"
    }
}

fn table(page: &mut String, title: &str, column: &str, entries: &[&Entry]) {
    if entries.is_empty() {
        return;
    }
    let _ = write!(page, "<h2>{title}</h2>\n<table>\n<tr><th>Device<th>{column}\n"); // into a String: cannot fail
    for entry in entries {
        let what = match &entry.left_out {
            Some(left_out) => left_out.to_string(),
            None => addresses(entry),
        };
        let _ = writeln!(page, "<tr><td>{}<td>{}", encode_text(&entry.name), encode_text(&what));
    }
    page.push_str("</table>\n");
}

fn addresses(entry: &Entry) -> String {
    let addresses: Vec<_> = read_groups(&entry.text).map(|group| group.targets[0].to_string()).collect();
    addresses.join(" ")
}
