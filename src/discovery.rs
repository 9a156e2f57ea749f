//! The loop: fetch, map, write, wait. It knows nothing of HTTP, files or clocks.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::Level;

use crate::inventory::{Entry, Inventory, Source, State};
use crate::query::FleetRef;
use crate::target::Rules;

/// The wait after the first failure; it doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_secs(5);
/// The longest wait, unless the interval is longer still.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// Lines of each kind that a refresh may add to the log; the rest is at debug.
const MOST_LINES: usize = 20;

/// Why a refresh failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    /// One word for it, for metrics.
    pub reason: &'static str,
    /// What was being done, to what, and what to do next.
    pub message: String,
    /// The chain of causes, if there is more to tell.
    pub detail: String,
    /// How long the other side asks to be left alone.
    pub retry_after: Option<Duration>,
}

impl Failure {
    /// A failure with nothing more to tell.
    pub fn new(reason: &'static str, message: impl Display) -> Self {
        Failure { reason, message: message.to_string(), ..Failure::default() }
    }

    fn tell(&self, and: &str) {
        log::warn!("refresh failed: {}; {and}", self.message);
        if !self.detail.is_empty() {
            log::debug!("the causes in full: {}", self.detail);
        }
    }
}

/// Where the list goes.
pub trait Sink {
    /// What people know it by.
    fn name(&self) -> String;
    /// The devices in the list that stands there, if it can be read.
    fn held(&self) -> Option<Vec<Entry>>;
    /// Puts the list there, unless it is there already.
    fn publish(&mut self, list: &Inventory) -> Result<Published, Failure>;
}

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

/// The passing of time.
pub trait Clock {
    /// The time now, on a clock that nobody sets.
    fn now(&self) -> Instant;
    /// Waits until then, or until it is told otherwise; false means that it is time to stop.
    fn wait(&mut self, until: Instant) -> bool;
}

/// Keeps a sink true to a source.
pub struct Discovery<'a> {
    source: &'a mut dyn Source,
    sink: &'a mut dyn Sink,
    rules: Rules,
    fleets: Vec<FleetRef>,
    inventory: Inventory,
    /// The devices as they were last announced.
    announced: Option<Devices>,
    warned: BTreeSet<String>,
    refused: bool,
}

impl<'a> Discovery<'a> {
    /// Nothing is fetched yet.
    pub fn new(source: &'a mut dyn Source, sink: &'a mut dyn Sink, rules: Rules, fleets: Vec<FleetRef>) -> Self {
        let inventory = Inventory::default();
        let (announced, warned) = (None, BTreeSet::new());
        Discovery { source, sink, rules, fleets, inventory, announced, warned, refused: false }
    }

    /// Refreshes at this interval, counted from start to start, until the clock says so; without one, once. Tells
    /// whether the last refresh did what it should.
    pub fn run(mut self, interval: Option<Duration>, clock: &mut dyn Clock) -> bool {
        let mut failures = 0;
        loop {
            let start = clock.now();
            let refreshed = self.refresh();
            let stays = || format!("{} stays as it is", self.sink.name());
            let Some(interval) = interval else {
                if let Err(failure) = &refreshed {
                    failure.tell(&stays());
                }
                return matches!(refreshed, Ok(Published::Written | Published::Unchanged));
            };
            let next = match refreshed {
                Ok(_) => {
                    failures = 0;
                    start + interval
                }
                Err(failure) => {
                    let wait = failure.retry_after.unwrap_or_else(|| backoff(failures, interval));
                    failures += 1;
                    let shown = humantime::format_duration(Duration::from_secs(wait.as_secs()));
                    failure.tell(&format!("{}, next try in {shown}", stays()));
                    clock.now() + wait
                }
            };
            if !clock.wait(next) {
                return true;
            }
        }
    }

    /// One refresh: all pages or nothing.
    pub fn refresh(&mut self) -> Result<Published, Failure> {
        self.inventory.refresh(self.source, &self.rules)?;
        let first = self.announced.is_none();
        let before = self.announced.take().unwrap_or_else(|| keyed(self.sink.held().unwrap_or_default()));
        let published = self.sink.publish(&self.inventory);
        if let (Ok(published), true) =
            (&published, first || self.inventory.changed || published == Ok(Published::Written))
        {
            let now = keyed(self.inventory.entries().cloned());
            self.announce(&before, &now, *published, first);
            self.announced = Some(now);
            self.inventory.changed = false;
        } else {
            log::debug!("{} is unchanged", self.sink.name());
            self.announced = Some(before);
        }
        published
    }

    /// Tells what became of the list, and of each device whose state changed; a warning is told once.
    fn announce(&mut self, before: &Devices, now: &Devices, published: Published, first: bool) {
        let changes = Changes::between(before, now);
        let (name, left_out) = (self.sink.name(), now.values().filter(|entry| entry.targets() == 0).count());
        let summary = format!(
            "{} of {} (+{} -{} ~{}), {} left out",
            count(now.values().map(Entry::targets).sum(), "target"),
            count(now.len() - left_out, "device"),
            changes.added,
            changes.removed,
            changes.changed,
            count(left_out, "device")
        );
        match published {
            Published::Written => log::info!("updated {name}: {summary}"),
            Published::Unchanged if first || !changes.lines.is_empty() => log::info!("{name} is up to date: {summary}"),
            Published::Unchanged => log::debug!("{name} is up to date: {summary}"),
            Published::Refused if self.refused => {}
            Published::Refused => log::warn!(
                "{name} keeps its targets, since there would be none left: {} left out, the rest gone; if that is \
                 right, set --write-empty (WRITE_EMPTY=true)",
                count(left_out, "device")
            ),
        }
        self.refused = published == Published::Refused;
        tell(&changes.lines);
        let warnings = self.warnings();
        let new = warnings.difference(&self.warned).map(|warning| (Level::Warn, warning.clone()));
        tell(&new.collect::<Vec<_>>());
        self.warned = warnings;
    }

    fn warnings(&self) -> BTreeSet<String> {
        let fleets = self.fleets.iter().filter_map(|fleet| {
            let named: Vec<_> = self.inventory.fleets_named(fleet).into_iter().collect();
            match (fleet, &*named) {
                (_, []) => Some(format!(
                    "fleet {fleet} was asked for, but the key sees no such device in it: is the fleet spelled right \
                     (slugs are case-sensitive), and may the key see it?"
                )),
                (FleetRef::Name(_), [_, _, ..]) => Some(format!(
                    "fleet name {fleet} is that of several fleets, and all are taken: {}",
                    named.join(", ")
                )),
                _ => None,
            }
        });
        self.inventory.warnings().map(str::to_owned).chain(fleets).collect()
    }
}

/// The wait after that many failures before: doubling, and at random in its upper half, so that many sidecars do not
/// come back at once.
fn backoff(failures: u32, interval: Duration) -> Duration {
    let doubled = FIRST_WAIT.min(interval).saturating_mul(2_u32.saturating_pow(failures));
    doubled.min(LONGEST_WAIT.max(interval)).mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// Devices by rising id; those without one of their own by name.
type Devices = BTreeMap<(u64, Option<Arc<str>>), Entry>;

fn keyed(entries: impl IntoIterator<Item = Entry>) -> Devices {
    let key = |entry: &Entry| (entry.id, (entry.id == 0).then(|| entry.name.clone()));
    entries.into_iter().map(|entry| (key(&entry), entry)).collect()
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// From one list to the next: how many devices of it, and a line for each.
#[derive(Default)]
struct Changes {
    added: usize,
    removed: usize,
    changed: usize,
    lines: Vec<(Level, String)>,
}

impl Changes {
    fn between(before: &Devices, now: &Devices) -> Self {
        let mut changes = Changes::default();
        for (key, entry) in now {
            let old = before.get(key);
            if old.is_some_and(|old| old.state == entry.state) {
                continue;
            }
            let was_listed = old.is_some_and(|old| old.targets() > 0);
            let name = &entry.name;
            changes.lines.push(match &entry.state {
                State::Listed { .. } if was_listed => {
                    changes.changed += 1;
                    (Level::Info, format!("changed {name}"))
                }
                State::Listed { targets, .. } => {
                    changes.added += 1;
                    (Level::Info, format!("added {name}: {}", count(*targets, "target")))
                }
                State::LeftOut(reason) => {
                    changes.removed += usize::from(was_listed);
                    let level = if reason.is_fault() { Level::Warn } else { Level::Info };
                    (level, format!("left out {name}: {reason}"))
                }
            });
        }
        for (_, gone) in before.iter().filter(|(key, _)| !now.contains_key(key)) {
            changes.removed += usize::from(gone.targets() > 0);
            changes.lines.push((Level::Info, format!("removed {}: the API does not list it any more", gone.name)));
        }
        changes
    }
}

/// The first lines as they are, the rest at debug.
fn tell(lines: &[(Level, String)]) {
    for (index, (level, line)) in lines.iter().enumerate() {
        log::log!(if index < MOST_LINES { *level } else { Level::Debug }, "{line}");
    }
    if lines.len() > MOST_LINES {
        log::info!("and {} more such lines at log level debug", lines.len() - MOST_LINES);
    }
}
