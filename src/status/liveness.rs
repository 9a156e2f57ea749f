//! When the loop will move next, at the latest, and what the API answered: told by whoever is about to wait, for whoever
//! wants to know whether it still does.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::balena::failure::Failure;
use crate::discovery::inventory::Answer;

/// Later than this it is not late but stuck.
const OVERDUE: Duration = Duration::from_secs(60);

/// The pulse of the loop.
pub struct Pulse {
    next: Mutex<Instant>,
    answers: Mutex<Answers>,
}

/// How many requests had which status, or no answer.
type Answers = BTreeMap<Option<u16>, u64>;

impl Pulse {
    /// It is expected to move now.
    pub fn start() -> Self {
        Pulse { next: Mutex::new(Instant::now()), answers: Mutex::default() }
    }

    /// It will move at this moment at the latest.
    pub fn expect(&self, next: Instant) {
        *lock(&self.next) = next;
    }

    /// Takes note of how a request was answered.
    pub fn count(&self, answer: &Result<Answer, Failure>) {
        let code = match answer {
            Ok(Answer::Unchanged) => Some(304),
            Ok(Answer::Devices(..) | Answer::TooLarge(_)) => Some(200),
            Err(failure) => failure.code,
        };
        *lock(&self.answers).entry(code).or_default() += 1;
    }

    /// How long ago it should have moved, if that is too long.
    pub fn overdue(&self) -> Option<Duration> {
        let late = Instant::now().saturating_duration_since(*lock(&self.next));
        (late > OVERDUE).then_some(late)
    }

    /// How many requests had which answer.
    pub fn answers(&self) -> BTreeMap<Option<u16>, u64> {
        lock(&self.answers).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
