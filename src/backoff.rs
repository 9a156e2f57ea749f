//! The wait after a failure: doubling, jitter, and the server's `Retry-After`.

use std::time::{Duration, SystemTime};

/// The wait after the first failure, unless the interval is shorter; it doubles with each further failure.
const FIRST_WAIT: Duration = Duration::from_secs(5);
/// The longest wait, unless the interval is longer.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// The longest `Retry-After` that is honoured.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// Counts failures in a row.
#[derive(Debug)]
pub struct Backoff {
    interval: Duration,
    failures: u32,
}

impl Backoff {
    /// For something that is done at this interval while it succeeds.
    pub fn new(interval: Duration) -> Self {
        Backoff { interval, failures: 0 }
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Forgets the failures.
    pub fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// Counts a failure and gives the wait until the next try: the server's `Retry-After`, or else a random one in the
    /// upper half of the doubled wait, so that many sidecars do not return at the same moment.
    pub fn failed(&mut self, retry_after: Option<Duration>) -> Duration {
        let doubled = FIRST_WAIT.min(self.interval).saturating_mul(2_u32.saturating_pow(self.failures));
        let longest = LONGEST_WAIT.max(self.interval);
        self.failures = self.failures.saturating_add(1);
        retry_after.unwrap_or_else(|| doubled.min(longest).mul_f64(0.5 + fastrand::f64() / 2.0))
    }
}

/// The wait that a `Retry-After` asks for, at most an hour: seconds, or a date. A date counts from the answer's own
/// `Date`, since the clock of this device may be wrong. None if it asks for no wait or cannot be read.
pub fn retry_after(value: &str, date: Option<&str>, now: SystemTime) -> Option<Duration> {
    let is_number = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
    let wait = if is_number {
        // Digits that do not fit into a number are a very long wait.
        value.parse().map_or(LONGEST_RETRY_AFTER, Duration::from_secs)
    } else {
        let sent = date.and_then(|date| httpdate::parse_http_date(date).ok()).unwrap_or(now);
        httpdate::parse_http_date(value).ok()?.duration_since(sent).ok()?
    };
    Some(wait.min(LONGEST_RETRY_AFTER)).filter(|wait| !wait.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// The waits of so many failures, with the bounds that jitter keeps: half of the doubled wait to all of it.
    fn bounds(interval: u64, failures: usize) -> Vec<(Duration, Duration)> {
        let mut waits = vec![(Duration::MAX, Duration::ZERO); failures];
        for _ in 0..200 {
            let mut backoff = Backoff::new(Duration::from_secs(interval));
            for (least, most) in &mut waits {
                let wait = backoff.failed(None);
                (*least, *most) = ((*least).min(wait), (*most).max(wait));
            }
        }
        waits
    }

    #[test]
    fn waits_double_up_to_five_minutes_with_jitter_in_their_upper_half() {
        let full = [5, 10, 20, 40, 80, 160, 300, 300];
        for (full, (least, most)) in full.iter().zip(bounds(30, 8)) {
            let full = Duration::from_secs(*full);
            assert!(least >= full / 2 && most <= full, "{least:?} to {most:?} of {full:?}");
            assert!(most > least + full / 4, "no jitter: {least:?} to {most:?}");
        }
    }

    #[test]
    fn a_short_interval_is_the_first_wait_and_a_long_one_the_longest() {
        assert!(bounds(1, 1)[0].1 <= Duration::from_secs(1));
        let waits = bounds(3600, 16);
        assert!(waits[15].0 >= HOUR / 2 && waits[15].1 <= HOUR, "{waits:?}");
        let mut endless = Backoff { interval: HOUR, failures: u32::MAX };
        assert!(endless.failed(None) <= HOUR);
    }

    #[test]
    fn a_success_begins_anew_and_retry_after_replaces_the_wait_but_counts_as_a_failure() {
        let mut backoff = Backoff::new(Duration::from_secs(30));
        assert_eq!(backoff.failed(Some(HOUR)), HOUR);
        assert_eq!(backoff.failures(), 1);
        assert!(backoff.failed(None) > Duration::from_secs(5) - Duration::from_millis(1));
        backoff.succeeded();
        assert_eq!(backoff.failures(), 0);
        assert!(backoff.failed(None) <= Duration::from_secs(5));
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_against_the_servers_clock() {
        let now = httpdate::parse_http_date("Wed, 25 Nov 2026 10:00:00 GMT").unwrap();
        let seconds = |wait| Some(Duration::from_secs(wait));
        let cases = [
            ("3", None, seconds(3)),
            ("0", None, None),
            ("", None, None),
            ("-5", None, None),
            ("1.5", None, None),
            ("soon", None, None),
            ("86400", None, Some(HOUR)),
            ("99999999999999999999999", None, Some(HOUR)),
            ("Wed, 25 Nov 2026 10:00:07 GMT", None, seconds(7)),
            ("Wed, 25 Nov 2026 09:00:00 GMT", None, None),
            ("Thu, 01 Jan 1970 00:00:13 GMT", Some("Thu, 01 Jan 1970 00:00:10 GMT"), seconds(3)),
            ("Thu, 01 Jan 1970 00:00:09 GMT", Some("Thu, 01 Jan 1970 00:00:10 GMT"), None),
            ("Fri, 31 Dec 2399 23:59:59 GMT", Some("Thu, 01 Jan 1970 00:00:10 GMT"), Some(HOUR)),
            ("Wed, 25 Nov 2026 10:00:07 GMT", Some("today"), seconds(7)),
        ];
        for (value, date, wait) in cases {
            assert_eq!(retry_after(value, date, now), wait, "{value:?} at {date:?}");
        }
    }
}
