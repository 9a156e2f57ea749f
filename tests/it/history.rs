//! Whatever happened to the fleet, in whatever order, and whichever requests failed: after a refresh that succeeds the
//! list is the one that a fresh start would make.

use std::collections::BTreeMap;

use crate::support::fakes::{Row, Rows, list, rules};
use baletheus::discovery::inventory::Inventory;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::json;

fn rows(devices: &BTreeMap<u64, u8>) -> Vec<Row> {
    let device = |(id, name): (&u64, &u8)| {
        (*id, json!({ "id": id, "uuid": format!("{id:032x}"), "device_name": name.to_string() }))
    };
    devices.iter().map(device).collect()
}

#[derive(Clone, Debug)]
enum Event {
    /// A device comes, or is renamed.
    Set(u64, u8),
    Remove(u64),
    Refresh {
        fails: Option<usize>,
    },
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (1..120_u64, any::<u8>()).prop_map(|(id, name)| Event::Set(id, name)),
        3 => (1..120_u64).prop_map(Event::Remove),
        2 => proptest::option::of(1..20_usize).prop_map(|fails| Event::Refresh { fails }),
    ]
}

proptest! {
    #[test]
    fn a_list_is_as_if_freshly_made(start in vec(1..120_u64, 0..100), events in vec(event(), 1..60), most in 1..20_usize) {
        let mut devices: BTreeMap<u64, u8> = start.into_iter().map(|id| (id, 0)).collect();
        let mut kept = Inventory::default();
        for event in events.into_iter().chain([Event::Refresh { fails: None }]) {
            match event {
                Event::Set(id, name) => drop(devices.insert(id, name)),
                Event::Remove(id) => drop(devices.remove(&id)),
                Event::Refresh { fails } => {
                    let rows = rows(&devices);
                    if kept.refresh(&mut Rows::new(&rows, most).failing(fails), &rules()).is_err() {
                        prop_assert!(fails.is_some());
                        continue;
                    }
                    let mut fresh = Inventory::default();
                    fresh.refresh(&mut Rows::new(&rows, most), &rules()).expect("nothing fails");
                    let [kept_text, fresh_text] = [&kept, &fresh].map(|inventory| String::from_utf8(list(inventory)).expect("UTF-8"));
                    prop_assert_eq!(kept_text, fresh_text);
                    let ids: Vec<u64> = kept.entries().map(|entry| entry.id).collect();
                    prop_assert_eq!(ids, devices.keys().copied().collect::<Vec<_>>());
                    // and at rest it costs no body
                    let mut api = Rows::new(&rows, most);
                    kept.refresh(&mut api, &rules()).expect("nothing fails");
                    prop_assert_eq!(api.bodies, 0);
                }
            }
        }
    }
}
