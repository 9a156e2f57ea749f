//! What comes before the tables of devices: the state, what is wrong, counts, fleets, and the filter.

use std::collections::BTreeMap;
use std::io::{Result, Write};

use html_escape::{encode_double_quoted_attribute, encode_text};

use super::view::View;
use super::wanted::Wanted;
use crate::logging::count;

/// The page loads itself again after so many seconds.
pub const REFRESH: &str = "30";

/// The devices of a fleet, counted.
#[derive(Default)]
pub struct Fleet {
    /// All of them.
    pub devices: usize,
    /// Those that balenaCloud sees offline.
    pub offline: usize,
    /// Their targets.
    pub targets: usize,
    /// Those that are left out.
    pub left_out: usize,
}

impl View {
    /// Writes all of it. `found` is how many devices the filter leaves.
    ///
    /// # Errors
    /// `out` fails.
    pub fn write_head(
        &self, out: &mut Vec<u8>, total: &Fleet, fleets: &BTreeMap<&str, Fleet>, found: usize,
    ) -> Result<()> {
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

    fn write_fleets(&self, out: &mut Vec<u8>, fleets: &BTreeMap<&str, Fleet>) -> Result<()> {
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

    fn write_controls(&self, out: &mut Vec<u8>, total: &Fleet, found: usize) -> Result<()> {
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
}
