//! The log on standard error: text for people or JSON for machines, one line a record whatever the record holds.

use std::io::{self, Write as _};
use std::time::{Duration, SystemTime};

use env_logger::{Builder, Logger, Target};
use log::{Level, LevelFilter, Log, Metadata, Record};
use serde::Serialize;

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
}

/// Starts the log. Libraries log only with `RUST_LOG`: the program's own line already has the error of the library.
pub fn init(settings: &Settings) {
    let mut builder = Builder::new();
    match &settings.filter {
        // A filter for this program would beat one of `RUST_LOG` for every module.
        Some(filter) => builder.parse_filters(filter),
        None => builder.filter_module(env!("CARGO_PKG_NAME"), settings.level),
    };
    let json = settings.json;
    builder.format(move |out, record| {
        out.write_all(&line(json, record.level(), record.target(), &record.args().to_string()))
    });
    let note = move |dropped| {
        let text = format!(
            "{} lost: standard error was not read",
            count(usize::try_from(dropped).unwrap_or(usize::MAX), "log line")
        );
        line(json, Level::Warn, module_path!(), &text)
    };
    // Without a thread the program writes its log directly.
    let queue = Queue::start(io::stderr(), note).ok();
    if let Some(queue) = &queue {
        builder.target(Target::Pipe(Box::new(queue.clone())));
    }
    let logger = builder.build();
    log::set_max_level(logger.filter());
    // It fails where a log was started before, which then stays.
    let _ = log::set_boxed_logger(Box::new(Queued { logger, queue }));
}

/// `env_logger` does not know how to flush a pipe.
struct Queued {
    logger: Logger,
    queue: Option<Queue>,
}

impl Log for Queued {
    fn enabled(&self, metadata: &Metadata) -> bool {
        self.logger.enabled(metadata)
    }

    fn log(&self, record: &Record) {
        self.logger.log(record);
    }

    fn flush(&self) {
        if let Some(queue) = &self.queue {
            queue.flush(FLUSH_TIMEOUT);
        }
    }
}

/// A record as a line.
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
