//! Whatever happened to the fleet, in whatever order, and whichever requests failed: after a refresh that succeeds the
//! list is the one that a fresh start would make.

use std::collections::BTreeMap;

use baletheus::balena::{Answer, Failure, Reason};
use baletheus::discovery::Source;
use baletheus::discovery::exporter;
use baletheus::discovery::inventory::Inventory;
use baletheus::discovery::target::Rules;
use baletheus::discovery::target_file;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::json;

/// A fleet of ids and names; answers hold at most so many devices, and their text is their `ETag`.
struct Api<'a> {
    devices: &'a BTreeMap<u64, u8>,
    most: usize,
    /// The number of the request that fails.
    fails: Option<usize>,
    requests: usize,
    bodies: usize,
}

impl Source for Api<'_> {
    fn name(&self) -> &str {
        "the API"
    }

    fn page(&mut self, after: u64, top: usize, etag: Option<&str>) -> Result<Answer, Failure> {
        if top > self.most {
            return Ok(Answer::TooLarge { etag: None });
        }
        self.requests += 1;
        if self.fails == Some(self.requests) {
            return Err(Failure::new(Reason::Timeout, "fails"));
        }
        let device = |(id, name): (&u64, &u8)| json!({ "id": id, "uuid": format!("{id:032x}"), "device_name": name.to_string() });
        let devices: Vec<_> = self.devices.range(after + 1..).take(top).map(device).collect();
        let body = json!({ "d": devices }).to_string();
        if etag == Some(&body) {
            return Ok(Answer::Unchanged);
        }
        self.bodies += 1;
        Ok(Answer::Body { etag: Some(body.clone()), body: body.into_bytes() })
    }

    fn identity(&mut self, _: u64) -> Result<Answer, Failure> {
        unreachable!("a single device is never too large here")
    }
}

fn rules() -> Rules {
    Rules { exporters: exporter::parse_list("80").expect("an exporter"), ..Rules::default() }
}

fn text(inventory: &Inventory) -> String {
    String::from_utf8(target_file::parts(inventory.texts()).collect::<Vec<_>>().concat()).expect("UTF-8")
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
                    let mut api = Api { devices: &devices, most, fails, requests: 0, bodies: 0 };
                    if kept.refresh(&mut api, &rules()).is_err() {
                        prop_assert!(fails.is_some());
                        continue;
                    }
                    let mut fresh = Inventory::default();
                    fresh.refresh(&mut Api { fails: None, ..api }, &rules()).expect("nothing fails");
                    prop_assert_eq!(text(&kept), text(&fresh));
                    let ids: Vec<u64> = kept.entries().map(|entry| entry.id).collect();
                    prop_assert_eq!(ids, devices.keys().copied().collect::<Vec<_>>());
                    // and at rest it costs no body
                    let mut api = Api { devices: &devices, most, fails: None, requests: 0, bodies: 0 };
                    kept.refresh(&mut api, &rules()).expect("nothing fails");
                    prop_assert_eq!(api.bodies, 0);
                }
            }
        }
    }
}
