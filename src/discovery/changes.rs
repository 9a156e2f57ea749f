//! What the log announces, once: what became of the list, of each device whose state changed, and what is amiss.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};
use std::iter;
use std::sync::Arc;
use std::time::Duration;

use log::Level;
use serde_json::Value;

use crate::balena::client::Balena;
use crate::balena::failure::Published;
use crate::balena::query::FleetRef;
use crate::discovery::inventory::{Answer, Entry, Inventory, fingerprint};

/// Whose key it is must not hold up the first list for long.
const WHOAMI_TIMEOUT: Duration = Duration::from_secs(10);
/// Lines of each kind that a refresh may add to the log; the rest is at debug.
const MOST_LINES: usize = 20;

/// What was told already.
pub struct Journal {
    /// The fleets that were asked for.
    fleets: Vec<FleetRef>,
    /// The devices as they were told of, in order.
    devices: Option<Vec<Arc<Entry>>>,
    /// The version of the list that was told of last.
    told: Option<u64>,
    warnings: BTreeSet<String>,
    refused: bool,
}

impl Journal {
    /// Nothing was told yet.
    pub fn new(fleets: Vec<FleetRef>) -> Self {
        Journal { fleets, devices: None, told: None, warnings: BTreeSet::new(), refused: false }
    }

    /// Takes note, the first time, of the devices that were listed before.
    pub fn begin(&mut self, held: impl FnOnce() -> Vec<Arc<Entry>>) {
        self.devices.get_or_insert_with(|| in_order(held()));
    }

    /// Tells what is new of a list that was published.
    pub fn tell(&mut self, list: &Inventory, published: Published, name: &str) {
        let before = self.devices.take().unwrap_or_default();
        if self.told == Some(list.version) && published != Published::Written {
            log::debug!("{name} is unchanged");
            self.devices = Some(before);
            return;
        }
        let now = in_order(list.entries().cloned().collect());
        // What nobody sees is not kept: at first there is a line for each device.
        let most = if log::log_enabled!(Level::Debug) { usize::MAX } else { MOST_LINES };
        let (mut lines, mut number) = (Vec::new(), 0);
        let [added, removed, changed] = changes(&before, &now, |change| {
            number += 1;
            if lines.len() < most {
                lines.push(change);
            }
        });
        let left_out = now.iter().filter(|entry| entry.targets == 0).count();
        let summary = format!(
            "{} of {} (+{added} -{removed} ~{changed}), {} left out",
            count(now.iter().map(|entry| entry.targets).sum(), "target"),
            count(now.len() - left_out, "device"),
            count(left_out, "device")
        );
        match published {
            Published::Written => log::info!("updated {name}: {summary}"),
            Published::Unchanged if self.told.is_none() || !lines.is_empty() => {
                log::info!("{name} is up to date: {summary}");
            }
            Published::Unchanged => log::debug!("{name} is up to date: {summary}"),
            Published::Refused if self.refused => {}
            Published::Refused => log::warn!(
                "{name} keeps its targets, since there would be none left: {} left out, the rest gone; if that is \
                 right, set --write-empty (WRITE_EMPTY=true)",
                count(left_out, "device")
            ),
        }
        tell(Level::Info, &lines, number);
        let warnings = warnings(list, &self.fleets);
        let new: Vec<_> = warnings.difference(&self.warnings).collect();
        tell(Level::Warn, &new, new.len());
        (self.devices, self.warnings) = (Some(now), warnings);
        (self.told, self.refused) = (Some(list.version), published == Published::Refused);
    }
}

/// By rising id, and those without one of their own by name.
fn key(entry: &Entry) -> (u64, Option<&str>) {
    (entry.id, (entry.id == 0).then_some(&entry.name))
}

fn in_order(mut entries: Vec<Arc<Entry>>) -> Vec<Arc<Entry>> {
    entries.sort_by(|one, other| key(one).cmp(&key(other)));
    entries
}

/// What became of a device.
enum Change<'a> {
    Added(&'a Entry),
    Changed(&'a Entry),
    LeftOut(&'a Entry),
    Removed(&'a Entry),
}

impl Display for Change<'_> {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self {
            Change::Added(entry) => write!(f, "added {}: {}", entry.name, count(entry.targets, "target")),
            Change::Changed(entry) => write!(f, "changed {}", entry.name),
            Change::LeftOut(entry) => {
                let why = entry.left_out.as_ref().map_or("", |left_out| &left_out.why);
                write!(f, "left out {}: {why}", entry.name)
            }
            Change::Removed(entry) => write!(f, "removed {}: the API does not list it any more", entry.name),
        }
    }
}

/// How many devices were added, removed and changed; `note` is told of each.
fn changes<'a>(before: &'a [Arc<Entry>], now: &'a [Arc<Entry>], mut note: impl FnMut(Change<'a>)) -> [usize; 3] {
    let ([mut added, mut removed, mut changed], mut gone) = ([0; 3], Vec::new());
    let mut before = before.iter().peekable();
    for entry in now {
        gone.extend(iter::from_fn(|| before.next_if(|old| key(old) < key(entry))));
        let old = before.next_if(|old| key(old) == key(entry));
        let is_same = |old: &Arc<Entry>| {
            let has_text = || old.text == entry.text || old.record == fingerprint(&entry.text);
            let is_alike = || (old.targets, &old.left_out) == (entry.targets, &entry.left_out);
            Arc::ptr_eq(old, entry) || is_alike() && has_text()
        };
        if old.is_some_and(is_same) {
            continue;
        }
        let was_listed = old.is_some_and(|old| old.targets > 0);
        note(if entry.left_out.is_some() {
            removed += usize::from(was_listed);
            Change::LeftOut(entry)
        } else if was_listed {
            changed += 1;
            Change::Changed(entry)
        } else {
            added += 1;
            Change::Added(entry)
        });
    }
    for gone in gone.into_iter().chain(before) {
        removed += usize::from(gone.targets > 0);
        note(Change::Removed(gone));
    }
    [added, removed, changed]
}

/// What is amiss with devices that are listed all the same, and with the fleets that were asked for.
pub fn warnings(list: &Inventory, fleets: &[FleetRef]) -> BTreeSet<String> {
    let fleets = fleets.iter().filter_map(|fleet| {
        let named: Vec<_> = list.fleets_named(fleet).into_iter().collect();
        match (fleet, &*named) {
            (_, []) => Some(format!(
                "fleet {fleet} was asked for, but the key sees no such device in it: is the fleet spelled right (slugs \
                 are case-sensitive), and may the key see it?"
            )),
            (FleetRef::Name(_), [_, _, ..]) => Some(format!(
                "fleet name {fleet} is that of several fleets, all of which are taken: {}",
                named.join(", ")
            )),
            _ => None,
        }
    });
    list.warnings().map(str::to_owned).chain(fleets).collect()
}

/// The first of so many lines at this level, the rest at debug.
fn tell(level: Level, lines: &[impl Display], number: usize) {
    for (index, line) in lines.iter().enumerate() {
        log::log!(if index < MOST_LINES { level } else { Level::Debug }, "{line}");
    }
    if number > MOST_LINES {
        log::info!("and {} more such lines at log level debug", number - MOST_LINES);
    }
}

/// `1 device`, `2 devices`.
pub fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// A device's own key sees that one device only, or nothing at all, without any warning of the API's.
pub fn warn_of_a_devices_key(balena: &mut Balena) {
    let body = match balena.get("/actor/v1/whoami", None, WHOAMI_TIMEOUT) {
        Ok(Answer::Devices(_, body)) => body,
        Ok(_) => return,
        Err(failure) => return log::debug!("cannot tell whose key this is: {}", failure.message),
    };
    let actor: Value = serde_json::from_slice(&body).unwrap_or_default();
    if actor["actorType"] == "device" {
        log::warn!(
            "the API key is a device's own and shows that one device only, or none: create a named API key \
             (balenaCloud's dashboard, Preferences, Access tokens) and set API_KEY to it"
        );
    }
}
