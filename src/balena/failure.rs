//! How a refresh ends.

use std::fmt::Display;
use std::time::Duration;

/// What became of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// It replaced another one.
    Written,
    /// It was there already.
    Unchanged,
    /// It has no targets, and the one that stands there has some.
    Refused,
}

/// Why a refresh failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    /// One word for it, for metrics.
    pub reason: &'static str,
    /// What was being done, to what, and what to do next.
    pub message: String,
    /// The chain of causes, if there is more to tell.
    pub detail: String,
    /// The status of the answer, if there was one.
    pub code: Option<u16>,
    /// How long the other side asks to be left alone.
    pub retry_after: Option<Duration>,
}

impl Failure {
    /// A failure with nothing more to tell.
    pub fn new(reason: &'static str, message: impl Display) -> Self {
        Failure { reason, message: message.to_string(), ..Failure::default() }
    }

    /// One line for people, and the causes at debug.
    pub fn tell(&self, and: &str) {
        log::warn!("refresh failed: {}; {and}", self.message);
        if !self.detail.is_empty() {
            log::debug!("the causes in full: {}", self.detail);
        }
    }
}
