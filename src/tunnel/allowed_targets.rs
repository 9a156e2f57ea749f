//! Where the tunnel may go: the hosts and ports of the targets that stand in the target file now.

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

use crate::discovery::changes::count;
use crate::discovery::target_file::{Look, look};

/// The largest target file, in bytes: as much as discovery writes.
const LARGEST_FILE: u64 = 1 << 30;

/// A reading that takes longer is not waited for: the last list rather than none.
const PROMPT: Duration = Duration::from_secs(1);
/// A file that could not be read is tried again after this, even if it looks as it did.
const AGAIN: Duration = Duration::from_secs(10);

type Targets = HashSet<Box<str>>;

/// The targets of a target file, which is read again when it has changed.
pub struct Allowed {
    path: PathBuf,
    held: Mutex<Held>,
    /// How many there are.
    count: IntGauge,
}

#[derive(Default)]
struct Held {
    targets: Targets,
    /// What the file looked like when it was last read, if it could be seen.
    seen: Option<Look>,
    /// What the last reading came to, and when; none before the first.
    read: Option<(Result<(), String>, Instant)>,
    reading: Option<Reading>,
}

/// It goes on without the scrape that began it.
struct Reading {
    look: Option<Look>,
    start: Instant,
    task: JoinHandle<Result<Targets, String>>,
}

impl Allowed {
    /// Nothing is read yet.
    pub fn new(path: PathBuf, count: IntGauge) -> Self {
        Allowed { path, held: Mutex::default(), count }
    }

    /// Whether this `host:port` is a target. A file that cannot be read, or has none, leaves those that were read last.
    pub async fn has(&self, target: &str) -> bool {
        let look = look(&self.path);
        let mut held = self.held.lock().await;
        let again = match &held.read {
            None => true,
            Some((Ok(()), _)) => held.seen != look,
            Some((Err(_), when)) => held.seen != look || when.elapsed() >= AGAIN,
        };
        if again && held.reading.is_none() {
            let path = self.path.clone();
            held.reading = Some(Reading { look, start: Instant::now(), task: spawn_blocking(move || read(&path)) });
        }
        if let Some(reading) = &mut held.reading
            && let Ok(read) = timeout_at(reading.start + PROMPT, &mut reading.task).await
        {
            let look = reading.look;
            held.reading = None;
            self.take(&mut held, look, read.unwrap_or_else(|error| Err(error.to_string())));
        }
        held.targets.contains(target)
    }

    fn take(&self, held: &mut Held, look: Option<Look>, read: Result<Targets, String>) {
        let path = self.path.display();
        let read = read.map(|targets| {
            let level = if held.targets.is_empty() { Level::Info } else { Level::Debug };
            log::log!(level, "{} in {path}", count(targets.len(), "target"));
            self.count.set(i64::try_from(targets.len()).unwrap_or(i64::MAX));
            held.targets = targets;
        });
        let is_new = held.seen != look || held.read.as_ref().is_none_or(|(before, _)| *before != read);
        if let Err(why) = &read
            && is_new
        {
            let left = match held.targets.len() {
                0 => "Until then all is refused".to_owned(),
                targets => format!("The {} of before stay", count(targets, "target")),
            };
            log::warn!("{path} {why}; is it the file that baletheus writes (--sd-file, SD_FILE_PATH)? {left}");
        }
        (held.seen, held.read) = (look, Some((read, Instant::now())));
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
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err("is no file".into());
    }
    let file = File::open(path).map_err(unreadable)?;
    let mut text = Vec::new();
    file.take(LARGEST_FILE + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > LARGEST_FILE {
        return Err("is too large".into());
    }
    let groups: Vec<Group> = serde_json::from_slice(&text).map_err(|error| format!("is no target file: {error}"))?;
    let targets: Targets =
        groups.iter().flat_map(|group| &group.targets).map(|target| target.to_ascii_lowercase().into()).collect();
    if targets.is_empty() { Err("holds no target".into()) } else { Ok(targets) }
}
