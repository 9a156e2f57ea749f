//! Which targets the tunnel may go to: those in the target file, by host and port.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use log::Level;
use prometheus::IntGauge;
use tokio::sync::{Mutex, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::discovery::labels::SCHEME;
use crate::discovery::target::Group;
use crate::discovery::target_file::{Identity, identity};
use crate::net::threads::{self, NoThread};
use crate::text::count;

/// The largest target file, in bytes: as much as discovery writes, and less on a 32-bit processor, which has no room for that and for
/// what is made of it.
const MAX_FILE: u64 = if usize::BITS < 64 { 1 << 28 } else { 1 << 30 };
/// How long a scrape waits for the file. After that the list that was read before decides: the file system may hang.
const READ_TIMEOUT: Duration = Duration::from_secs(1);
/// For a target that is in the list, the file is checked no more often than this. Each check wakes another thread and waits for it,
/// which would be a good part of the cost of a scrape.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// The wait before a file that could not be read is tried again, even if it has not changed.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// A target that the tunnel may go to.
#[derive(Clone, Debug)]
pub struct Target {
    /// `host:port`, in lower case.
    pub name: String,
    /// Whether a target group with it has the scheme https.
    pub is_https: bool,
    /// Since when the file lists it.
    pub listed: Instant,
}

/// The targets by `host:port`: whether one is https, and since when it is listed.
type Targets = HashMap<Box<str>, (bool, Instant)>;

/// The targets of the target file, which is read again when it has changed.
pub struct AllowedTargets {
    path: PathBuf,
    /// To the thread that checks the file.
    checks: mpsc::Sender<Check>,
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
    pending: Option<Pending>,
    /// The start of the last check that has a result.
    checked: Option<Instant>,
}

impl State {
    fn find(&self, target: &str) -> Option<Target> {
        let (is_https, listed) = *self.targets.get(target)?;
        Some(Target { name: target.to_owned(), is_https, listed })
    }
}

/// A check of the file.
struct Check {
    /// The metadata when the file was last read.
    seen: Option<Identity>,
    /// Whether the file is read even if its metadata are the same.
    reads_anyway: bool,
    found: oneshot::Sender<Found>,
}

/// The file's metadata, and its targets if it was read.
type Found = (Option<Identity>, Option<Result<Targets, String>>);

/// A check that has no result yet. It goes on if the scrape that started it ends.
struct Pending {
    start: Instant,
    found: oneshot::Receiver<Found>,
}

impl AllowedTargets {
    /// Starts the thread that checks the file, and reads nothing yet.
    pub fn new(path: PathBuf, count: IntGauge) -> Result<Self, NoThread> {
        let (checks, waiting) = mpsc::channel::<Check>();
        let file = path.clone();
        threads::spawn("target file", move || {
            for check in waiting {
                let identity = identity(&file);
                let targets = (check.reads_anyway || check.seen != identity).then(|| read(&file));
                let _ = check.found.send((identity, targets)); // the scrape may have ended
            }
        })?;
        Ok(AllowedTargets { path, checks, state: Mutex::default(), count })
    }

    /// The target with this `host:port`. If the file cannot be read or holds no target, the list that was read before decides.
    pub async fn find(&self, target: &str) -> Option<Target> {
        let asked = Instant::now();
        let mut state = self.state.lock().await;
        // While this waited for the lock, another scrape may have checked the file for all that wait.
        if state.checked.is_some_and(|checked| checked >= asked) {
            return state.find(target);
        }
        let is_recent = state.checked.is_some_and(|checked| checked.elapsed() < CHECK_INTERVAL);
        if let Some(found) = state.find(target).filter(|_| is_recent) {
            return Some(found);
        }
        // A scrape that ended may have left a check behind, which may be older than the file.
        if self.finish(&mut state).await {
            let reads_anyway =
                state.read.as_ref().is_none_or(|(read, when)| read.is_err() && when.elapsed() >= RETRY_INTERVAL);
            let (found, receiver) = oneshot::channel();
            state.pending = Some(Pending { start: Instant::now(), found: receiver });
            let _ = self.checks.send(Check { seen: state.seen, reads_anyway, found }); // the thread never ends
            self.finish(&mut state).await;
        }
        state.find(target)
    }

    /// Waits for the pending check; false if it takes too long.
    async fn finish(&self, state: &mut State) -> bool {
        let Some(pending) = &mut state.pending else { return true };
        let Ok(found) = timeout_at(pending.start + READ_TIMEOUT, &mut pending.found).await else { return false };
        state.checked = Some(pending.start);
        state.pending = None;
        if let Ok((identity, Some(read))) = found {
            self.take(state, identity, read);
        }
        true
    }

    fn take(&self, state: &mut State, identity: Option<Identity>, read: Result<Targets, String>) {
        let path = self.path.display();
        let read = read.map(|mut targets| {
            for (name, (_, listed)) in &mut targets {
                if let Some((_, before)) = state.targets.get(name) {
                    *listed = *before;
                }
            }
            let level = if state.targets.is_empty() { Level::Info } else { Level::Debug };
            log::log!(level, "{} in {path}", count(targets.len(), "target"));
            self.count.set(i64::try_from(targets.len()).unwrap_or(i64::MAX));
            state.targets = targets;
        });
        let is_new = state.seen != identity || state.read.as_ref().is_none_or(|(before, _)| *before != read);
        if let Err(why) = &read
            && is_new
        {
            let until = match state.targets.len() {
                0 => "Every scrape is refused until it has targets".to_owned(),
                targets => format!("The {} that were read before stay", count(targets, "target")),
            };
            log::warn!("{path} {why}; is it the file that baletheus writes (--sd-file, SD_FILE_PATH)? {until}");
        }
        (state.seen, state.read) = (identity, Some((read, Instant::now())));
    }
}

/// A target group of any program that writes target files.
type AnyGroup<'a> = Group<Vec<Cow<'a, str>>, Option<BTreeMap<Cow<'a, str>, Cow<'a, str>>>>;

fn read(path: &Path) -> Result<Targets, String> {
    let unreadable = |error| format!("cannot be read: {error}");
    // Reading a pipe would block until somebody writes into it.
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err("is no file".into());
    }
    let too_large = || "is too large".to_owned();
    // Checked first, since reading the file takes as much memory.
    if metadata.len() > MAX_FILE {
        return Err(too_large());
    }
    let file = File::open(path).map_err(unreadable)?;
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_FILE {
        return Err(too_large());
    }
    let groups: Vec<AnyGroup> = serde_json::from_slice(&text).map_err(|error| format!("is no target file: {error}"))?;
    let (mut targets, now) = (Targets::new(), Instant::now());
    for group in &groups {
        let is_https =
            group.labels.as_ref().and_then(|labels| labels.get(SCHEME)).is_some_and(|scheme| scheme == "https");
        for target in &group.targets {
            targets.entry(target.to_ascii_lowercase().into()).or_insert((false, now)).0 |= is_https;
        }
    }
    if targets.is_empty() { Err("holds no target".into()) } else { Ok(targets) }
}
