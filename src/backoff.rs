//! The wait after a failure: doubling, jitter, and the server's `Retry-After`.

use std::time::{Duration, SystemTime};

/// The wait after the first failure, unless the interval is shorter; it doubles with each further failure.
const FIRST_WAIT: Duration = Duration::from_secs(5);
/// The longest wait, unless the interval is longer.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// The longest `Retry-After` that is honoured.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);

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

    pub fn failures(&self) -> u32 {
        self.failures
    }

    pub fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// Counts a failure and gives the wait until the next try: at least the doubled wait, and at least the server's
    /// `Retry-After`. Up to a quarter of the doubled wait is added at random, so that many sidecars do not return at the same
    /// moment.
    pub fn failed(&mut self, retry_after: Option<Duration>) -> Duration {
        let doubled = FIRST_WAIT.min(self.interval).saturating_mul(2_u32.saturating_pow(self.failures));
        let wait = doubled.min(LONGEST_WAIT.max(self.interval));
        self.failures = self.failures.saturating_add(1);
        wait.max(retry_after.unwrap_or_default()).saturating_add(wait.mul_f64(fastrand::f64() / 4.0))
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
