//! Whether the loop of discovery lives: each of its waits announces a deadline, and `/-/healthy` and the watchdog of systemd fail
//! 60 s past it.

use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Past its deadline by more than this, the loop hangs.
const MAX_DELAY: Duration = Duration::from_secs(60);
/// How long a loop that was frozen may take to run again.
pub const THAW: Duration = Duration::from_secs(1);
/// The deadline that the loop has announced.
pub struct Liveness(Mutex<Instant>);

impl Liveness {
    /// The deadline is now.
    pub fn start() -> Self {
        Liveness(Mutex::new(Instant::now()))
    }

    /// Announces the next deadline.
    pub fn expect(&self, next: Instant) {
        *self.0.lock() = next;
    }

    /// How long the loop is past its deadline, if it hangs. A process that was frozen (`docker pause`) is past it until its loop
    /// runs again, so a loop that is late has another second.
    pub fn overdue(&self) -> Option<Duration> {
        self.late()?;
        thread::sleep(THAW);
        self.late()
    }

    /// How long the loop is past its deadline by now.
    pub fn late(&self) -> Option<Duration> {
        let next = *self.0.lock();
        let late = Instant::now().saturating_duration_since(next);
        (late > MAX_DELAY).then_some(late)
    }
}
