//! The log on standard error: text for people or JSON for machines, one line a record whatever the record holds.

use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use env_filter::Filter;
use log::{Level, LevelFilter, Log, Metadata, Record};
use serde::Serialize;

use crate::key_renewal::KeySource;
use crate::log_queue::Queue;
use crate::text::{count, printable, printable_json};

/// How long an ending program waits for its last lines to be read.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

/// What the log holds, and in which form.
#[derive(Debug)]
pub struct Settings {
    /// The level of the program itself.
    pub level: LevelFilter,
    /// `RUST_LOG`, checked, if it is set; it beats the level.
    pub filter: Option<String>,
    /// One JSON object a line instead of text.
    pub json: bool,
    /// What is allowed but looks like a mistake: logged once at the start.
    pub warnings: Vec<String>,
}

/// Starts the log, which does not show this key. Libraries log only with `RUST_LOG`: the program's own line already has the error of
/// the library.
pub fn init(settings: &Settings, key: &KeySource) {
    let mut filter = env_filter::Builder::new();
    match &settings.filter {
        // A filter for this program would beat one of `RUST_LOG` for every module. The text was checked.
        Some(text) => _ = filter.try_parse(text),
        None => _ = filter.filter_module(env!("CARGO_PKG_NAME"), settings.level),
    }
    let (filter, json) = (filter.build(), settings.json);
    let note = move |dropped| {
        let text = format!("{} lost: standard error was not read", count(dropped, "log line"));
        line(json, Level::Warn, module_path!(), &text)
    };
    // Without a thread the program writes its log directly.
    let queue = Queue::start(io::stderr(), note).ok();
    log::set_max_level(filter.filter());
    let warnings = Metadata::builder().target(env!("CARGO_PKG_NAME")).level(Level::Warn).build();
    let hides_warnings = !filter.enabled(&warnings);
    let logger = Logger { filter, json, queue, key: key.clone() };
    if let Some(text) = settings.filter.as_ref().filter(|_| hides_warnings) {
        let text = format!("RUST_LOG={text} hides this program's warnings: add baletheus=info to it");
        logger.write(line(json, Level::Error, module_path!(), &text));
    }
    // It fails where a log was started before, which then stays.
    let _ = log::set_boxed_logger(Box::new(logger));
    for warning in &settings.warnings {
        log::warn!("{warning}");
    }
}

struct Logger {
    filter: Filter,
    json: bool,
    queue: Option<Queue>,
    key: KeySource,
}

impl Logger {
    fn write(&self, line: Vec<u8>) {
        match &self.queue {
            Some(queue) => queue.push(line),
            None => drop(io::stderr().write_all(&line)), // there is no place to report a failure
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record) {
        if self.filter.matches(record) {
            let message = self.key.hidden_in(&record.args().to_string());
            self.write(line(self.json, record.level(), record.target(), &message));
        }
    }

    fn flush(&self) {
        if let Some(queue) = &self.queue {
            queue.flush(FLUSH_TIMEOUT);
        }
    }
}

fn line(json: bool, level: Level, target: &str, message: &str) -> Vec<u8> {
    let time = humantime::format_rfc3339_millis(SystemTime::now());
    if json {
        let fields = Fields { time: time.to_string(), level: level.as_str(), target, message };
        let json = serde_json::to_string(&fields).unwrap_or_default(); // text is always JSON
        return (printable_json(&json) + "\n").into_bytes();
    }
    let module = if target.starts_with(env!("CARGO_PKG_NAME")) { String::new() } else { format!("{target}: ") };
    format!("{time} {level:<5} {module}{}\n", printable(message)).into_bytes()
}

#[derive(Serialize)]
struct Fields<'a> {
    time: String,
    level: &'a str,
    target: &'a str,
    message: &'a str,
}
