//! Which targets the tunnel may go to: those in the target file, by host and port.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::Level;
use prometheus::IntGauge;
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout_at};

use crate::discovery::target_file::{Identity, identity};
use crate::logging::count;

/// The largest target file, in bytes: as much as discovery writes.
const MAX_FILE: u64 = 1 << 30;
/// How long a scrape waits for the file to be read. After that the previous list decides.
const READ_TIMEOUT: Duration = Duration::from_secs(1);
/// The wait before a file that could not be read is tried again, even if it has not changed.
const RETRY: Duration = Duration::from_secs(10);

type Targets = HashSet<Box<str>>;

/// The targets of the target file, which is read again when it has changed.
pub struct AllowedTargets {
    path: PathBuf,
    state: Mutex<State>,
    /// The number of targets.
    count: IntGauge,
}

#[derive(Default)]
struct State {
    targets: Targets,
    /// The file's metadata when it was last read, if there was a file.
    seen: Option<Identity>,
    /// The result of the last reading and its time; none before the first.
    read: Option<(Result<(), String>, Instant)>,
    reading: Option<Reading>,
}

/// A reading in progress. It goes on if the scrape that started it ends.
struct Reading {
    identity: Option<Identity>,
    start: Instant,
    task: JoinHandle<Result<Targets, String>>,
}

impl AllowedTargets {
    /// Reads nothing yet.
    pub fn new(path: PathBuf, count: IntGauge) -> Self {
        AllowedTargets { path, state: Mutex::default(), count }
    }

    /// Whether this `host:port` is a target. If the file cannot be read or holds no target, the previous list decides.
    pub async fn contains(&self, target: &str) -> bool {
        let identity = identity(&self.path);
        let mut state = self.state.lock().await;
        let changed = match &state.read {
            None => true,
            Some((Ok(()), _)) => state.seen != identity,
            Some((Err(_), when)) => state.seen != identity || when.elapsed() >= RETRY,
        };
        if changed && state.reading.is_none() {
            let path = self.path.clone();
            state.reading =
                Some(Reading { identity, start: Instant::now(), task: spawn_blocking(move || read(&path)) });
        }
        if let Some(reading) = &mut state.reading
            && let Ok(read) = timeout_at(reading.start + READ_TIMEOUT, &mut reading.task).await
        {
            let identity = reading.identity;
            state.reading = None;
            self.take(&mut state, identity, read.unwrap_or_else(|error| Err(error.to_string())));
        }
        state.targets.contains(target)
    }

    fn take(&self, state: &mut State, identity: Option<Identity>, read: Result<Targets, String>) {
        let path = self.path.display();
        let read = read.map(|targets| {
            let level = if state.targets.is_empty() { Level::Info } else { Level::Debug };
            log::log!(level, "{} in {path}", count(targets.len(), "target"));
            self.count.set(i64::try_from(targets.len()).unwrap_or(i64::MAX));
            state.targets = targets;
        });
        let is_new = state.seen != identity || state.read.as_ref().is_none_or(|(before, _)| *before != read);
        if let Err(why) = &read
            && is_new
        {
            let left = match state.targets.len() {
                0 => "Until then all is refused".to_owned(),
                targets => format!("The {} of before stay", count(targets, "target")),
            };
            log::warn!("{path} {why}; is it the file that baletheus writes (--sd-file, SD_FILE_PATH)? {left}");
        }
        (state.seen, state.read) = (identity, Some((read, Instant::now())));
    }
}

#[derive(Deserialize)]
struct Group<'a> {
    #[serde(borrow)]
    targets: Vec<Cow<'a, str>>,
}

fn read(path: &Path) -> Result<Targets, String> {
    let unreadable = |error| format!("cannot be read: {error}");
    // nobody may ever write into a pipe
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err("is no file".into());
    }
    let too_large = || "is too large".to_owned();
    // Before it is read: a program of 32 bits has no room for a byte more than the limit.
    if metadata.len() > MAX_FILE {
        return Err(too_large());
    }
    let file = File::open(path).map_err(unreadable)?;
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_FILE {
        return Err(too_large());
    }
    let groups: Vec<Group> = serde_json::from_slice(&text).map_err(|error| format!("is no target file: {error}"))?;
    let targets: Targets =
        groups.iter().flat_map(|group| &group.targets).map(|target| target.to_ascii_lowercase().into()).collect();
    if targets.is_empty() { Err("holds no target".into()) } else { Ok(targets) }
}
