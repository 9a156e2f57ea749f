//! The report of `check`: a table for people or JSON for programs, with a hint for each reason.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use crate::check::hints;
use crate::check::probe::ProbeSuccess;
use crate::discovery::left_out::LeftOut;
use crate::net::{ScrapeError, ScrapeReason};
use crate::text::{count, printable, printable_json};
use crate::word_enum::words;

/// The widest column of the table: a single longer cell does not widen its column.
const MAX_WIDTH: usize = 80;
/// Characters that the table shows of a name.
const MAX_NAME_LENGTH: usize = 60;

/// A target, or a device without one. These are the fields of `--json`.
#[derive(Debug, Default, Serialize)]
pub struct Row {
    /// The device's name and the beginning of its uuid.
    pub device: String,
    pub uuid: Option<String>,
    pub fleet: Option<String>,
    /// The name of the exporter.
    pub job: Option<String>,
    /// The service whose labels declare the exporter.
    pub service: Option<String>,
    /// Where the exporter comes from.
    pub origin: Option<&'static str>,
    /// The URL that is scraped; none if the device is left out.
    pub url: Option<String>,
    /// How long a scrape of it may take.
    #[serde(skip)]
    pub timeout: Duration,
    /// Whether balenaCloud sees the device.
    pub online: Option<bool>,
    /// The device's services that do not run; none if the device does not report them, is offline, or the key may not read them.
    pub services_not_running: Option<Vec<Stopped>>,
    pub result: TargetResult,
    pub samples: Option<usize>,
    pub seconds: Option<f64>,
    /// The word for why it is left out or does not answer.
    pub reason: Option<&'static str>,
    /// The HTTP status that refused, of the VPN proxy or of the exporter.
    pub status: Option<u16>,
    /// The result, for people.
    pub answer: String,
    /// What to do, if something is to be done.
    pub hint: Option<&'static str>,
}

/// A service that does not run, with its status in the API's words.
#[derive(Debug, Serialize)]
pub struct Stopped {
    pub service: Option<String>,
    pub status: String,
}

words! {
    /// What became of a target, or of a device without one.
    #[derive(Default, Serialize)]
    #[serde(rename_all = "snake_case")]
    TargetResult {
    /// The device has no target.
    #[default]
    LeftOut = "left_out",
    /// It answers.
    Answers = "answers",
    /// The target does not answer and balenaCloud sees the device offline, which is no failure.
    Offline = "offline",
    /// It should answer and does not.
    Fails = "fails",
    }
}

impl Row {
    pub fn left_out(self, left_out: &LeftOut) -> Self {
        let answer = format!("left out: {left_out}");
        Row { reason: Some(left_out.reason.as_str()), answer, hint: Some(hints::left_out(left_out.reason)), ..self }
    }

    /// Takes the result of a probe.
    pub fn answered(&mut self, answer: Result<ProbeSuccess, ScrapeError>) {
        match answer {
            Ok(scrape) => {
                let seconds = scrape.duration.as_secs_f64();
                self.result = TargetResult::Answers;
                self.samples = Some(scrape.samples);
                self.seconds = Some(seconds);
                let redirected = scrape.redirected.then_some(hints::REDIRECTED);
                self.hint = redirected.or(scrape.outdated.then_some(hints::OUTDATED));
                self.answer = format!("{} in {seconds:.2} s", count(scrape.samples, "sample"));
            }
            Err(refused) => {
                let offline = self.online == Some(false);
                self.result = if offline { TargetResult::Offline } else { TargetResult::Fails };
                self.reason = Some(refused.reason.as_str());
                self.status = refused.status;
                self.hint = Some(if offline { hints::OFFLINE } else { hints::scrape(&refused) });
                // these have their status in the message
                let status =
                    refused.status.filter(|_| !matches!(refused.reason, ScrapeReason::Http | ScrapeReason::Proxy));
                self.answer = refused.message + &status.map_or_else(String::new, |status| format!(" ({status})"));
            }
        }
    }

    /// Whether the target was tried, or there is none.
    pub fn is_known(&self) -> bool {
        self.url.is_none() || self.result != TargetResult::LeftOut
    }

    pub fn fails(&self) -> bool {
        self.result == TargetResult::Fails
    }
}

/// The report as a JSON array, with one object on each line.
pub fn json<'a>(rows: impl Iterator<Item = &'a Row>) -> String {
    let rows = rows.filter_map(|row| serde_json::to_string(row).ok());
    let lines: Vec<_> = rows.map(|row| format!("\n{}", printable_json(&row))).collect();
    format!("[{}\n]\n", lines.join(","))
}

const HEADS: [&str; 8] = ["DEVICE", "FLEET", "EXPORTER", "FROM", "ADDRESS", "STATE", "ANSWER", "WHAT TO DO"];

fn cells(row: &Row) -> [String; 8] {
    let online = match row.online {
        Some(true) => "online",
        Some(false) => "offline",
        None => "unknown",
    };
    // shortened where that is unambiguous
    let url = cell(row.url.as_deref());
    let url = url.strip_prefix("http://").unwrap_or(&url);
    let url = url.strip_suffix("/metrics").filter(|host| !host.contains('/')).unwrap_or(url);
    let service = row.service.as_ref().map(|service| format!("service {service}"));
    [
        cut(cell(Some(&row.device))),
        cut(cell(row.fleet.as_deref())),
        cut(cell(row.job.as_deref())),
        cut(cell(service.as_deref().or(row.origin))),
        url.to_owned(),
        online.into(),
        cell(Some(&row.answer)),
        row.hint.unwrap_or_default().into(),
    ]
}

/// A device chooses its name, and an exporter its answer: two columns are never beside each other in one cell.
fn cell(text: Option<&str>) -> String {
    printable(text.unwrap_or("-")).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A long name without its middle: the end of a device is its short uuid, which tells it from others.
fn cut(name: String) -> String {
    let letters: Vec<_> = name.chars().collect();
    if letters.len() <= MAX_NAME_LENGTH {
        return name;
    }
    let (start, end) = (&letters[..MAX_NAME_LENGTH - 11], &letters[letters.len() - 10..]);
    start.iter().chain(&['…']).chain(end).collect()
}

/// The report as a table of `shown`, with the counts of all rows; two lines for each row where the table is wider than the
/// terminal.
pub fn table<'a>(shown: impl Iterator<Item = &'a Row>, all: &[Row], terminal: Option<usize>) -> String {
    let mut lines: Vec<_> = shown.map(cells).collect();
    if !lines.is_empty() {
        lines.insert(0, HEADS.map(str::to_owned));
    }
    let width = |column: usize| {
        let cells = lines.iter().map(|line| line[column].width());
        cells.filter(|width| *width <= MAX_WIDTH).max().unwrap_or_default()
    };
    let widths: [usize; HEADS.len() - 1] = std::array::from_fn(width);
    let wide = lines.iter().map(|line| {
        let blanks = |cell: &str, width: usize| " ".repeat(width.saturating_sub(cell.width()) + 2);
        let cells = line.iter().zip(&widths).map(|(cell, width)| cell.to_owned() + &blanks(cell, *width));
        (cells.collect::<String>() + &line[HEADS.len() - 1]).trim_end().to_owned()
    });
    let mut text = wide.map(|line| line + "\n").collect::<String>();
    if terminal.is_some_and(|width| text.lines().any(|line| line.width() > width)) {
        text = lines.iter().skip(1).map(narrow).collect();
    }
    let of = |outcome| all.iter().filter(|row| row.result == outcome).count();
    let [left_out, answer, offline, fail] =
        [TargetResult::LeftOut, TargetResult::Answers, TargetResult::Offline, TargetResult::Fails].map(of);
    let targets = count(answer + offline + fail, "target");
    let left_out = count(left_out, "device");
    let space = if text.is_empty() { "" } else { "\n" };
    let _ = writeln!(text, "{space}{targets}: {answer} answer, {fail} fail, {offline} offline; {left_out} left out");
    text
}

/// A row in two lines: the device and its answer, then the exporter and what to do.
fn narrow([device, _, exporter, from, address, state, answer, hint]: &[String; 8]) -> String {
    // The name has the beginning of the uuid.
    let port = address.rsplit_once(':').map_or(&**address, |(_, port)| port);
    let hint = if hint.is_empty() { format!("from {from}") } else { hint.clone() };
    let target: Vec<_> = [&**exporter, port].into_iter().filter(|part| *part != "-").collect();
    let target = if target.is_empty() { String::new() } else { target.join(":") + ": " };
    format!("{device}, {state}: {answer}\n    {target}{hint}\n")
}
