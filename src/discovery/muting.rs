//! What mutes alerts: the tag `prometheus.io/alert` of a device or its fleet, and the times at which a fleet is switched off on
//! purpose, from its tag `prometheus.io/quiet`. Services are muted by a label of theirs: see `service_labels.rs`.

use std::time::{SystemTime, UNIX_EPOCH};

use super::label_prefix::ALERT;
use super::tags::Tags;
use crate::values::{BadValue, boolean};

const DAY: u64 = 24 * 60;
const WEEK: u64 = 7 * DAY;
/// 1970 began on a Thursday.
const EPOCH: u64 = 3 * DAY;
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// Whether a tag mutes the alerts of a device, left out or not.
pub fn is_muted(tags: &mut Tags) -> bool {
    tags.read(ALERT, boolean, |_, _| None) == Some(false)
}

/// Spans of each week: the minute at which one begins, since Monday 00:00 UTC, and its length in minutes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct QuietTimes(Vec<(u64, u64)>);

impl QuietTimes {
    /// Reads the value of the tag: `22:00-05:00`, `Fri 20:00-Mon 06:00`, or several with commas.
    ///
    /// # Errors
    /// What is wrong with which part of it.
    pub fn parse(text: &str) -> Result<Self, BadValue> {
        let mut spans = Vec::new();
        for part in text.split(',') {
            let wrong = |why: &str| {
                BadValue::from(format!("{:?}: {why}; use 22:00-05:00 or Fri 20:00-Mon 06:00, in UTC", part.trim()))
            };
            let (from, to) = part.split_once('-').ok_or_else(|| wrong("no two times with `-` between them"))?;
            let ((first, from), (last, to)) = (time(from).map_err(wrong)?, time(to).map_err(wrong)?);
            if from == DAY {
                return Err(wrong("a span cannot begin at 24:00"));
            }
            // Without days it is each day's.
            let (starts, period, from, to) = match (first, last) {
                (None, None) => (7, DAY, from, to),
                (Some(first), Some(last)) => (1, WEEK, first * DAY + from, last * DAY + to),
                _ => return Err(wrong("one time has a day and the other has none")),
            };
            if from == to {
                return Err(wrong("it ends when it begins"));
            }
            let length = if to > from { to - from } else { to + period - from };
            spans.extend((0..starts).map(|day| (from + day * DAY, length)));
        }
        Ok(QuietTimes(spans))
    }

    /// Whether the fleet is switched off at this time.
    pub fn has(&self, time: SystemTime) -> bool {
        let minutes = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / 60;
        let now = (minutes + EPOCH) % WEEK;
        self.0.iter().any(|(from, length)| (now + WEEK - from) % WEEK < *length)
    }
}

/// The day, Monday is 0, and the minute of the day.
fn time(text: &str) -> Result<(Option<u64>, u64), &'static str> {
    let (day, clock) = match text.trim().rsplit_once(' ') {
        None => (None, text.trim()),
        Some((day, clock)) => {
            let found = (0..).zip(DAYS).find(|(_, name)| name.eq_ignore_ascii_case(day.trim()));
            let has_zone = day.contains(':');
            let wrong = if has_zone { "a time has no zone" } else { "a day is Mon, Tue, Wed, Thu, Fri, Sat or Sun" };
            (Some(found.ok_or(wrong)?.0), clock)
        }
    };
    let number = |text: &str, most: u64| {
        let digits = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|number: &u64| digits && *number <= most)
    };
    let parts = clock.split_once(':').and_then(|(hour, minute)| Some((number(hour, 24)?, number(minute, 59)?)));
    match parts {
        Some((hour, minute)) if hour * 60 + minute <= DAY => Ok((day, hour * 60 + minute)),
        _ => Err("a time is 00:00 to 24:00"),
    }
}
