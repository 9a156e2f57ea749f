//! How text becomes a value: the same for an option, a tag and a label of a service.

use std::borrow::Cow;
use std::time::Duration;

use thiserror::Error;

/// Why a text is no value of its kind, as the end of a sentence about it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{why}")]
pub struct BadValue {
    /// The end of the sentence.
    pub why: Cow<'static, str>,
    /// Whether the same text may be a value at another start: a name may resolve then, or a file may be mounted.
    pub may_pass: bool,
}

impl<T: Into<Cow<'static, str>>> From<T> for BadValue {
    fn from(why: T) -> Self {
        BadValue { why: why.into(), may_pass: false }
    }
}

/// Whether text is in quotes. A shell removes them; Docker's `--env-file`, for one, takes them for a part of the value.
pub fn is_quoted(text: &str) -> bool {
    let text = text.trim();
    let within = |quote| text.strip_prefix(quote).is_some_and(|rest: &str| rest.ends_with(quote));
    within('"') || within('\'')
}

/// The items of a comma-separated list; empty ones are skipped.
pub fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

/// true/false, 1/0, yes/no or on/off, in any case.
pub fn boolean(text: &str) -> Result<bool, BadValue> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err("not a boolean (true/false, 1/0, yes/no, on/off)".into()),
    }
}

/// One of a few values, each by its word.
pub fn one_of<T: Copy>(text: &str, known: &[T], word: impl Fn(T) -> &'static str) -> Result<T, BadValue> {
    let found = known.iter().find(|value| word(**value) == text.trim());
    let words = || known.iter().map(|value| word(*value)).collect::<Vec<_>>().join(", ");
    found.copied().ok_or_else(|| format!("not one of {}", words()).into())
}

/// `http` or `https`.
///
/// # Errors
/// It is neither.
pub fn scheme(text: &str) -> Result<&'static str, BadValue> {
    one_of(text, &["http", "https"], |scheme| scheme)
}

/// A duration with its unit, from one second up to `longest` seconds.
pub fn duration(text: &str, longest: u64) -> Result<Duration, BadValue> {
    let duration = humantime::parse_duration(text.trim()).map_err(|_| "not a duration with its unit, such as 60s")?;
    let range = Duration::from_secs(1)..=Duration::from_secs(longest);
    range.contains(&duration).then_some(duration).ok_or("out of range".into())
}

/// An interval of up to 30 days: a duration, or a bare number of milliseconds.
pub fn interval(text: &str) -> Result<Duration, BadValue> {
    const LONGEST: u64 = 30 * 86400;
    let text = text.trim();
    let is_bare = text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        // The first baletheus took milliseconds without a unit.
        Ok(0..1000_u32) => Err("a bare number is milliseconds; write a unit, such as 30s".into()),
        _ if is_bare => duration(&format!("{text}ms"), LONGEST),
        _ => duration(text, LONGEST),
    }
}

/// A duration as it is written, and in milliseconds.
pub type Millis = (Cow<'static, str>, u64);

/// An interval between scrapes: a duration of Prometheus, at least 5 s.
pub fn scrape_interval(text: &str) -> Result<Millis, BadValue> {
    match prometheus_duration(text)? {
        ..5000 => Err("it is shorter than 5s".into()),
        millis => Ok((text.to_owned().into(), millis)),
    }
}

/// The time-out of a scrape: a duration of Prometheus, longer than 0.
pub fn scrape_timeout(text: &str) -> Result<Millis, BadValue> {
    match prometheus_duration(text)? {
        0 => Err("it has to be longer than 0s".into()),
        millis => Ok((text.to_owned().into(), millis)),
    }
}

/// A duration in Prometheus' own grammar, in milliseconds: `1h30m`, units descending, each at most once.
/// `humantime` has another grammar. The source is `model.ParseDuration` of Prometheus' `common`.
pub fn prometheus_duration(text: &str) -> Result<u64, BadValue> {
    const DAY: u64 = 86_400_000;
    const UNITS: [(&str, u64); 7] =
        [("y", 365 * DAY), ("w", 7 * DAY), ("d", DAY), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];
    // Leading zeros make a duration of any length.
    const MAX_LENGTH: usize = 64;
    let bad = || BadValue::from("it is not a duration of Prometheus, such as 30s or 1m30s");
    if text.is_empty() || text.len() > MAX_LENGTH {
        return Err(bad());
    }
    let mut rest = text;
    let mut units = UNITS.iter();
    let mut millis = 0_u64;
    while !rest.is_empty() {
        let number;
        (number, rest) = rest.split_at(rest.bytes().take_while(u8::is_ascii_digit).count());
        let unit;
        (unit, rest) = rest.split_at(rest.bytes().take_while(u8::is_ascii_alphabetic).count());
        let (_, length) = units.find(|(name, _)| *name == unit).ok_or_else(bad)?;
        let part = number.parse().ok().and_then(|number: u64| number.checked_mul(*length));
        millis = part.and_then(|part| millis.checked_add(part)).ok_or_else(bad)?;
    }
    // Prometheus counts nanoseconds in an i64.
    if millis > i64::MAX as u64 / 1_000_000 { Err(bad()) } else { Ok(millis) }
}
