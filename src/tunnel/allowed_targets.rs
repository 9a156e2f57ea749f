//! Which targets the tunnel may go to: those in the target file, by host and port.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use log::Level;
use tokio::sync::{Mutex, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::discovery::target_file::{Identity, identity};
use crate::net::threads;
use crate::text::count;
use crate::tunnel::metrics::TunnelMetrics;
use crate::tunnel::target_list::{BadTargetFile, Destination, TargetList, read};

/// How long a scrape waits for the file. After that the list that was read before decides: the file system may hang.
const READ_TIMEOUT: Duration = Duration::from_secs(1);
/// For a target that is in the list, the file is checked no more often than this. Each check starts a thread and waits for it,
/// which would be a good part of the cost of a scrape.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The wait before a file that could not be read is tried again, even if it has not changed.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// The targets of the target file, which is read again when it has changed.
pub struct AllowedTargets {
    path: PathBuf,
    state: Mutex<State>,
    metrics: Arc<TunnelMetrics>,
}

#[derive(Default)]
struct State {
    targets: Arc<TargetList>,
    /// The file's metadata when it was last read, if there was a file.
    seen: Option<Identity>,
    /// The time of the last reading, and why it failed if it did; none before the first.
    read: Option<(Option<String>, Instant)>,
    pending: Option<Pending>,
    /// The start of the last check that has a result.
    checked: Option<Instant>,
}

/// The file's metadata, and its targets.
type Reading = (Option<Identity>, Result<TargetList, BadTargetFile>);

/// A check that has no result yet. It goes on if the scrape that started it ends.
struct Pending {
    start: Instant,
    /// It closes without a reading if the file has not changed, or if no thread could be started.
    reading: oneshot::Receiver<Reading>,
}

impl AllowedTargets {
    /// Reads nothing yet.
    pub fn new(path: PathBuf, metrics: Arc<TunnelMetrics>) -> Self {
        AllowedTargets { path, state: Mutex::default(), metrics }
    }

    /// The target with this `host:port`. If the file cannot be read or holds no target, the list that was read before decides.
    pub async fn find(&self, target: &str) -> Option<Arc<Destination>> {
        let asked = Instant::now();
        let mut state = self.state.lock().await;
        // While this waited for the lock, another scrape may have checked the file for all that wait.
        if state.checked.is_some_and(|checked| checked >= asked) {
            return state.targets.get(target).cloned();
        }
        let is_recent = state.checked.is_some_and(|checked| checked.elapsed() < CHECK_INTERVAL);
        if let Some(found) = state.targets.get(target).filter(|_| is_recent) {
            return Some(found.clone());
        }
        // A scrape that ended may have left a check behind, which may be older than the file.
        if self.finish(&mut state).await {
            state.pending = Some(self.start_check(&state));
            self.finish(&mut state).await;
        }
        state.targets.get(target).cloned()
    }

    /// Reads the file if it has changed.
    pub async fn check(&self) {
        self.find("").await; // no target has this address, so the file decides
    }

    /// Starts a thread that checks the file. Without one, the list stays.
    fn start_check(&self, state: &State) -> Pending {
        let reads_anyway =
            state.read.as_ref().is_none_or(|(failure, when)| failure.is_some() && when.elapsed() >= RETRY_INTERVAL);
        let (file, seen, before) = (self.path.clone(), state.seen, state.targets.clone());
        let (sender, reading) = oneshot::channel();
        let _ = threads::spawn("target file", move || {
            let identity = identity(&file);
            if reads_anyway || seen != identity {
                let _ = sender.send((identity, read(&file, &before))); // the scrape may have ended
            }
        });
        Pending { start: Instant::now(), reading }
    }

    /// Waits for the pending check; false if it takes too long.
    async fn finish(&self, state: &mut State) -> bool {
        let Some(pending) = &mut state.pending else { return true };
        let Ok(reading) = timeout_at(pending.start + READ_TIMEOUT, &mut pending.reading).await else { return false };
        state.checked = Some(pending.start);
        state.pending = None;
        if let Ok(reading) = reading {
            self.take(state, reading);
        }
        true
    }

    fn take(&self, state: &mut State, (identity, read): Reading) {
        let path = self.path.display();
        let failure = read.as_ref().err().map(ToString::to_string);
        let is_new = state.seen != identity || state.read.as_ref().is_none_or(|(before, _)| *before != failure);
        if let Ok(targets) = read {
            let level = if state.targets.is_empty() { Level::Info } else { Level::Debug };
            log::log!(level, "{} in {path}", count(targets.len(), "target"));
            state.targets = Arc::new(targets);
            self.metrics.listed(&state.targets);
        }
        if let Some(why) = failure.as_ref().filter(|_| is_new) {
            let until = match state.targets.len() {
                0 => "Every scrape is refused until it has targets".to_owned(),
                targets => format!("The list that was read before stays, with {}", count(targets, "target")),
            };
            log::warn!("{path} {why}; is it the file that baletheus writes (--sd-file, SD_FILE_PATH)? {until}");
        }
        (state.seen, state.read) = (identity, Some((failure, Instant::now())));
    }
}
