//! Whatever happened to the fleet, in whatever order, and whichever requests failed: after a successful refresh the list is the
//! one that a new start would make.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::fakes::{self, Row, Rows, list, release};
use baletheus::discovery::inventory::Inventory;
use baletheus::discovery::target::Rules;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::json;

/// Releases that devices run.
const RELEASES: u64 = 6;

/// The name and the release of each device. Release 0 is none.
type Devices = BTreeMap<u64, (u8, u64)>;

fn rows(devices: &Devices) -> Vec<Row> {
    let device = |(id, (name, release)): (&u64, &(u8, u64))| {
        let release = if *release > 0 { json!([{ "id": release }]) } else { json!([]) };
        let uuid = format!("{id:032x}");
        (*id, json!({ "id": id, "uuid": uuid, "device_name": name.to_string(), "is_running__release": release }))
    };
    devices.iter().map(device).collect()
}

/// The releases with the ports that they declare. Port 0 is no label.
fn releases(ports: &BTreeMap<u64, u16>) -> Vec<Row> {
    let labels = |id: &u64, port: &u16| match port {
        0 => release(*id, "app", &[]),
        port => release(*id, "app", &[("prometheus.io.port", &port.to_string())]),
    };
    ports.iter().map(|(id, port)| labels(id, port)).collect()
}

#[derive(Clone, Debug)]
enum Event {
    /// A device comes, is renamed, or gets another release.
    Set(u64, u8, u64),
    Remove(u64),
    /// A release declares another port.
    Label(u64, u16),
    Refresh {
        fails: Option<usize>,
        /// The list of releases does not show this one yet, if no device ran it before.
        late: Option<u64>,
    },
}

fn event() -> impl Strategy<Value = Event> {
    use proptest::option::of;
    prop_oneof![
        6 => (1..120_u64, 0..3_u8, 0..=RELEASES).prop_map(|(id, name, release)| Event::Set(id, name, release)),
        3 => (1..120_u64).prop_map(Event::Remove),
        3 => (1..=RELEASES, 0..4_u16).prop_map(|(release, port)| Event::Label(release, port)),
        3 => (of(1..20_usize), of(1..=RELEASES)).prop_map(|(fails, late)| Event::Refresh { fails, late }),
    ]
}

fn rules() -> Rules {
    Rules { service_labels: true, ..fakes::rules() }
}

fn text(inventory: &Inventory) -> String {
    String::from_utf8(list(inventory)).expect("UTF-8")
}

proptest! {
    #[test]
    fn a_list_is_as_if_freshly_made(start in vec(1..120_u64, 0..100), events in vec(event(), 1..60), most in 1..20_usize) {
        let mut devices: Devices = start.into_iter().map(|id| (id, (0, id % RELEASES))).collect();
        let mut ports: BTreeMap<u64, u16> = (1..=RELEASES).map(|id| (id, 80)).collect();
        let mut kept = Inventory::default();
        let mut ran = BTreeSet::new();
        for event in events.into_iter().chain([Event::Refresh { fails: None, late: None }]) {
            match event {
                Event::Set(id, name, release) => drop(devices.insert(id, (name, release))),
                Event::Remove(id) => drop(devices.remove(&id)),
                Event::Label(release, port) => drop(ports.insert(release, port)),
                Event::Refresh { fails, late } => {
                    let (rows, releases) = (rows(&devices), releases(&ports));
                    let late = late.filter(|late| !ran.contains(late));
                    ran.extend(devices.values().map(|(_, release)| *release));
                    let api = || Rows::new(&rows, most).with_releases(&releases, None);
                    let mut failing = Rows::new(&rows, most).with_releases(&releases, late).failing(fails);
                    if kept.refresh(&mut failing, &rules()).is_err() {
                        prop_assert!(fails.is_some());
                        continue;
                    }
                    let mut fresh = Inventory::default();
                    fresh.refresh(&mut api(), &rules()).expect("nothing fails");
                    prop_assert_eq!(text(&kept), text(&fresh));
                    let ids: Vec<u64> = kept.entries().map(|entry| entry.id().expect("an id")).collect();
                    prop_assert_eq!(ids, devices.keys().copied().collect::<Vec<_>>());
                    // The list of releases is complete from now on, and at rest it costs no body.
                    kept.refresh(&mut api(), &rules()).expect("nothing fails");
                    prop_assert_eq!(text(&kept), text(&fresh));
                    let mut quiet = api();
                    kept.refresh(&mut quiet, &rules()).expect("nothing fails");
                    prop_assert_eq!(quiet.bodies, 0);
                }
            }
        }
    }

    /// Whatever a gateway gives at once, a first list is whole.
    #[test]
    fn a_first_list_is_whole_from_behind_a_gateway(count in 0..150_u64, limit in 1..60_usize, most in 1..200_usize) {
        let devices: Devices = (1..=count).map(|id| (id, (0, id % RELEASES))).collect();
        let ports = (1..RELEASES).map(|id| (id, 80)).collect();
        let (rows, releases) = (rows(&devices), releases(&ports));
        let mut capped = Inventory::default();
        let mut source = Rows::new(&rows, most).with_releases(&releases, None).capped(limit);
        capped.refresh(&mut source, &rules()).expect("nothing fails");
        let ids: Vec<u64> = capped.entries().map(|entry| entry.id().expect("an id")).collect();
        prop_assert_eq!(ids, (1..=count).collect::<Vec<_>>());
    }
}

/// As of 50,000 devices behind a gateway that gives 50 at once.
#[test]
fn a_list_may_have_more_than_a_thousand_pages() {
    let devices: Devices = (1..=1500).map(|id| (id, (0, 1))).collect();
    let ports = [(1, 80)].into();
    let (rows, releases) = (rows(&devices), releases(&ports));
    let mut list = Inventory::default();
    let mut source = Rows::new(&rows, 200).with_releases(&releases, None).capped(1);
    list.refresh(&mut source, &rules()).expect("nothing fails");
    assert_eq!(list.entries().count(), 1500);
}
