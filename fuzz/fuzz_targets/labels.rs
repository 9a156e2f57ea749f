//! Any bytes as the API's answer about releases and the labels of their services: either the refresh fails, or the list keeps the
//! rules, and is the same when it is made again.
#![no_main]

use std::time::Duration;

use baletheus::balena::{Failure, Fetched, Listing, Request, Source};
use baletheus::discovery::exporter;
use baletheus::discovery::inventory::Inventory;
use baletheus::discovery::target::{Address, Rules};

#[path = "../../tests/support/fakes.rs"]
pub mod fakes;
#[path = "../../tests/support/rules.rs"]
mod rules;

/// Two devices that run the releases 1 and 2, and one that runs none.
const DEVICES: &[u8] = br#"{"d":[
    {"id":1,"uuid":"00000000000000000000000000000001","device_name":"a","is_running__release":[{"id":1}],"is_web_accessible":true},
    {"id":2,"uuid":"00000000000000000000000000000002","device_name":"b","is_running__release":[{"id":2}],"is_web_accessible":true},
    {"id":3,"uuid":"00000000000000000000000000000003","device_name":"c","is_running__release":[],"is_web_accessible":true}]}"#;

struct Answers<'a>(&'a [u8]);

impl Source for Answers<'_> {
    fn name(&self) -> &str {
        "the API"
    }

    fn get(&mut self, request: Request, _: Option<&str>) -> Result<Fetched, Failure> {
        let body = match request {
            Request::Page { list: Listing::Devices | Listing::DevicesWith(_), after: 0, .. } => DEVICES,
            Request::Page { list: Listing::Releases, after: 0, .. } | Request::ReleasesById(_) => self.0,
            _ => b"{\"d\":[]}",
        };
        Ok(Fetched::Body { etag: None, body: body.to_vec(), room: usize::MAX })
    }

    fn ask(&mut self, _: Request, _: Duration) -> Result<Fetched, Failure> {
        Ok(Fetched::TooLarge { etag: None })
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let address = if bytes.len() % 2 == 0 { Address::Vpn } else { Address::Public };
    let exporters = exporter::parse_list("node:9100").expect("an exporter");
    let rules = Rules { address, exporters, service_labels: true, ..fakes::rules() };
    let lists = [(); 2].map(|()| {
        let mut inventory = Inventory::default();
        inventory.refresh(&mut Answers(bytes), &rules).ok().map(|()| fakes::list(&inventory))
    });
    assert_eq!(lists[0], lists[1], "another list when it is made afresh");
    if let Some(list) = &lists[0]
        && let Err(why) = rules::check(list, &rules)
    {
        panic!("{why}");
    }
});
