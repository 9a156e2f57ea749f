//! What the program tells, on standard error: text for people or JSON for machines, one record a line whatever is in it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::SystemTime;

use log::LevelFilter;
use serde::Serialize;

use crate::config::options::{Values, one_of};

/// What the log holds, and in which form.
#[derive(Debug)]
pub struct Settings {
    /// How much the program itself tells.
    pub level: LevelFilter,
    /// `RUST_LOG`, checked, if it is set: it beats the level.
    pub filter: Option<String>,
    /// One JSON object a line instead of text.
    pub json: bool,
}

impl Settings {
    /// Reads its options.
    pub fn read(from: &mut Values) -> Self {
        Settings {
            level: from.one("log-level", |text| text.parse().map_err(|_| "no such level".into())),
            filter: from.all("RUST_LOG", filter).pop(),
            json: from.one("log-format", |text| one_of(text, [("text", false), ("json", true)])),
        }
    }
}

fn filter(text: &str) -> Result<String, String> {
    env_filter::Builder::new().try_parse(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

/// Sets up the log. Libraries are heard only with `RUST_LOG`: what they have to say of an error is in our own line.
pub fn init(settings: &Settings) {
    let mut builder = env_logger::Builder::new();
    match &settings.filter {
        // a filter for our own module would beat one for all beside it
        Some(filter) => builder.parse_filters(filter),
        None => builder.filter_module(env!("CARGO_PKG_NAME"), settings.level),
    };
    let json = settings.json;
    builder.format(move |out, record| {
        let (level, target, message) = (record.level(), record.target(), record.args().to_string());
        let time = humantime::format_rfc3339_millis(SystemTime::now());
        if json {
            let line = Line { time: time.to_string(), level: level.as_str(), target, message: &message };
            serde_json::to_writer(&mut *out, &line)?;
            return writeln!(out);
        }
        let of = if target.starts_with(env!("CARGO_PKG_NAME")) { String::new() } else { format!("{target}: ") };
        writeln!(out, "{time} {level:<5} {of}{}", printable(&message))
    });
    builder.init();
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    level: &'a str,
    target: &'a str,
    message: &'a str,
}

/// A device may name itself as it likes: what would start a new line, move a terminal's cursor or turn the direction
/// of writing is shown as an escape.
pub fn printable(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        let turns =
            matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || turns {
            let _ = write!(shown, "{}", c.escape_default()); // into a String: cannot fail
        } else {
            shown.push(c);
        }
        shown
    })
}

/// The end for mistakes in the configuration, all told at once; the log is not set up yet.
pub fn misconfigured(errors: &[String]) -> ExitCode {
    let what = if errors.len() == 1 { "a configuration error" } else { "configuration errors" };
    eprintln!("baletheus: {what}\n  {}\nbaletheus --help lists all options", errors.join("\n  "));
    ExitCode::from(2)
}

/// The last line before an end for want of something in the configuration or around the program.
pub fn cannot_start(why: &str) -> ExitCode {
    log::error!("cannot start: {why}");
    ExitCode::from(2)
}
