//! Where the tunnel may go: the hosts and ports of the targets that stand in the target file now.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use prometheus::IntGauge;
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use crate::journal::count;
use crate::registry::{Look, look};

/// The largest target file, in bytes: as much as discovery writes.
const LARGEST_FILE: u64 = 1 << 30;

/// The targets of a target file, which is read again when it has changed.
pub struct Allowed {
    path: PathBuf,
    held: Mutex<Held>,
    /// How many there are.
    count: IntGauge,
}

#[derive(Default)]
struct Held {
    /// What the file looked like when it was last read, if it could be seen.
    seen: Option<Look>,
    /// Whether that was ever tried.
    tried: bool,
    targets: HashSet<Box<str>>,
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
        if held.seen != look || !held.tried {
            (held.seen, held.tried) = (look, true);
            let path = self.path.clone();
            match spawn_blocking(move || read(&path)).await {
                Ok(Ok(targets)) => {
                    let told = if held.targets.is_empty() { log::Level::Info } else { log::Level::Debug };
                    log::log!(told, "{} in {}", count(targets.len(), "target"), self.path.display());
                    held.targets = targets;
                }
                Ok(Err(why)) => log::warn!(
                    "{} {why}; is it the file that baletheus writes (--sd-file, SD_FILE_PATH)? {}",
                    self.path.display(),
                    match held.targets.len() {
                        0 => "Until then all is refused".to_owned(),
                        targets => format!("The {} of before stay", count(targets, "target")),
                    }
                ),
                Err(error) => log::error!("{}: {error}", self.path.display()),
            }
            self.count.set(i64::try_from(held.targets.len()).unwrap_or(i64::MAX));
        }
        held.targets.contains(target)
    }
}

#[derive(Deserialize)]
struct Group<'a> {
    #[serde(borrow)]
    targets: Vec<Cow<'a, str>>,
}

fn read(path: &Path) -> Result<HashSet<Box<str>>, String> {
    let unreadable = |error| format!("cannot be read: {error}");
    let file = File::open(path).map_err(unreadable)?;
    let mut text = Vec::new();
    file.take(LARGEST_FILE + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > LARGEST_FILE {
        return Err("is too large".into());
    }
    let groups: Vec<Group> = serde_json::from_slice(&text).map_err(|error| format!("is no target file: {error}"))?;
    let targets: HashSet<Box<str>> =
        groups.iter().flat_map(|group| &group.targets).map(|target| target.to_ascii_lowercase().into()).collect();
    if targets.is_empty() { Err("holds no target".into()) } else { Ok(targets) }
}
