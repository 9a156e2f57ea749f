//! What the page shows, and how it shows a moment.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::wanted::Wanted;
use crate::status::device_metrics::{Devices, State};
use crate::status::list::List;

/// What the page shows.
pub struct View {
    /// `well`, `starting`, `failing` or `stuck`.
    pub state: &'static str,
    /// What is wrong, one sentence each.
    pub problems: Vec<String>,
    /// When the last successful refresh ended.
    pub refreshed: Option<SystemTime>,
    /// The last good list.
    pub list: Arc<List>,
    /// The state of the devices, as far as it is known.
    pub states: Vec<Arc<Devices<State>>>,
    /// What is asked for.
    pub wanted: Wanted,
    /// The present.
    pub now: SystemTime,
}

impl View {
    /// A moment by its distance from the present.
    pub fn ago(&self, time: SystemTime) -> String {
        let distance = self.now.duration_since(time).unwrap_or_default();
        let exact = humantime::format_rfc3339_seconds(time);
        format!("<time datetime=\"{exact}\" title=\"{exact}\">{} ago</time>", about(distance))
    }
}

/// A duration in its largest unit.
pub fn about(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}
