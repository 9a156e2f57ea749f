//! 25 invented devices, in the form of `cloud::recorded_devices`, and how such devices change.

use serde_json::{Value, json};
use sha1::{Digest, Sha1};

use super::cloud::{self, Cloud, Service, release_id};

struct Fleet {
    id: u64,
    slug: &'static str,
    device_type: &'static str,
    /// Memory and storage in MiB, as the API has them.
    sizes: (u32, u32),
    version: &'static str,
    /// The network of its devices, without the last number.
    lan: &'static str,
    tag: (&'static str, &'static str),
    names: &'static [&'static str],
}

const FLEETS: [Fleet; 4] = [
    Fleet {
        id: 1_704_211,
        slug: "polar-foods/cold-chain",
        device_type: "raspberrypi4-64",
        sizes: (3792, 28_100),
        version: "1.9.0",
        lan: "192.168.30",
        tag: ("env", "production"),
        names: &[
            "fridge-01",
            "fridge-02",
            "fridge-03",
            "fridge-04",
            "fridge-05",
            "freezer-01",
            "Kühlraum \"Süd\" & West",
            "冷蔵庫-07",
            "loading dock {bay 3}",
        ],
    },
    Fleet {
        id: 1_704_230,
        slug: "polar-foods/gateways",
        device_type: "generic-amd64",
        sizes: (7830, 116_200),
        version: "4.2.1",
        lan: "10.20.0",
        tag: ("env", "production"),
        names: &["gw-oslo", "gw-bergen", "gw-tromsø", "gw-narvik"],
    },
    Fleet {
        id: 1_822_654,
        slug: "city-lights/street-lamps",
        device_type: "raspberrypi3",
        sizes: (923, 13_568),
        version: "2.3.7",
        lan: "172.18.4",
        tag: ("department", "public works"),
        names: &[
            "lamp-0001",
            "lamp-0002",
            "lamp-0003",
            "lamp-0004",
            "lamp-0005",
            "lamp-0006",
            "lamp-0007",
            "lamp at O'Brien Street",
        ],
    },
    // The same name in another organization.
    Fleet {
        id: 1_822_701,
        slug: "city-lights/gateways",
        device_type: "raspberrypi4-64",
        sizes: (1848, 28_100),
        version: "0.14.0-rc.2",
        lan: "172.18.0",
        tag: ("env", "staging"),
        names: &["gateway-north", "gateway-south", "gateway-east", "bench <test>\t🚧"],
    },
];

/// Devices by rising id, in several fleets of two organizations, which ask to be scraped every 5 seconds.
pub fn demo_fleet() -> Vec<Value> {
    let all = FLEETS.iter().flat_map(|fleet| (1..).zip(fleet.names).map(move |(number, name)| (fleet, number, name)));
    let mut devices: Vec<_> =
        (9_310_004..).step_by(37).zip(all).map(|(id, (fleet, number, name))| device(fleet, number, id, name)).collect();
    let mut edit = |name: &str, field: &str, value: Value| find(&mut devices, name)[field] = value;
    for name in ["fridge-03", "gw-narvik", "lamp-0006"] {
        edit(name, "is_connected_to_vpn", json!(false));
        edit(name, "api_heartbeat_state", json!("offline"));
    }
    for name in ["fridge-02", "freezer-01", "gw-bergen", "lamp-0005", "gateway-south"] {
        edit(name, "is_web_accessible", json!(false));
    }
    edit("lamp-0007", "is_running__release", json!([])); // fresh from the box
    edit("lamp-0007", "ip_address", Value::Null);
    edit("gw-tromsø", "ip_address", json!("fe80::dea6:32ff:fe12:9b01 fd12:3456:789a:1::3"));
    edit("gateway-east", "os_variant", json!("dev"));
    for name in ["fridge-05", "lamp-0002"] {
        edit(name, "os_version", json!("balenaOS 5.3.27"));
        edit(name, "supervisor_version", json!("16.1.10"));
    }
    for device in &mut devices {
        run_services(device, &["node-exporter", "app"]);
    }
    // One has a service that ended, one downloads its next release, and one's update was rejected.
    let device = find(&mut devices, "gw-bergen");
    install(device, running_release(device), 2, "app", "exited", None);
    let device = find(&mut devices, "lamp-0004");
    set_target(device, "2.4.0");
    device["update_status"] = json!("downloading");
    let target = device["should_be_running__release"][0]["id"].as_u64().expect("a release");
    install(device, target, 1, "node-exporter", "Downloaded", None);
    install(device, target, 2, "app", "Downloading", Some(42));
    let device = find(&mut devices, "freezer-01");
    set_target(device, "1.10.0");
    device["update_status"] = json!("rejected");
    device["image_install"] = json!([]); // such a report has no services, though they run
    for (name, key, value) in [
        ("fridge-01", "site", "Tromsø harbour, hall 2"),
        ("freezer-01", "site", "Tromsø harbour, hall 2"),
        ("freezer-01", "calibrated", ""),
        ("gw-oslo", "prometheus.io/exporters", "node:80,app:8080/internal/metrics"),
        ("lamp-0004", "prometheus.io/exporters", "node:eighty"), // cannot be understood
        ("gateway-north", "env", "production"),                  // beats its fleet's
        ("bench <test>\t🚧", "prometheus.io/scrape", "false"),
    ] {
        set_tag(find(&mut devices, name), key, value);
    }
    devices
}

/// Gives each release the labels that its `docker-compose.yml` would have: node_exporter, and from version 5 on an application
/// beside it. A device without a release gets a tag.
pub fn declare_exporters(cloud: &Cloud) {
    const NODE: Service<'static> =
        ("node-exporter", &[("prometheus.io.port", "80"), ("prometheus.io.job", "node")], &[]);
    const APP: Service<'static> =
        ("app", &[("prometheus.io.port", "8080"), ("prometheus.io.path", "/internal/metrics")], &[]);
    let releases = cloud.change(|devices| {
        let running = devices.iter_mut().filter_map(|device| {
            let release = device["is_running__release"].get(0).cloned();
            if release.is_none() {
                set_tag(device, "prometheus.io/exporters", "node:80");
            }
            release
        });
        running.collect::<Vec<_>>()
    });
    for release in releases {
        let has_app = release["raw_version"].as_str().is_some_and(|version| version.starts_with("5."));
        let id = release["id"].as_u64().unwrap_or_default();
        cloud.set_services(id, &[NODE, if has_app { APP } else { ("app", &[], &[]) }]);
    }
}

/// The device of this name.
pub fn find<'a>(devices: &'a mut [Value], name: &str) -> &'a mut Value {
    let found = devices.iter_mut().find(|device| device["device_name"] == name);
    found.unwrap_or_else(|| panic!("no device has the name {name:?}"))
}

/// One more device of a fleet: like another one but for its identity.
pub fn sibling(of: &Value, id: u64, name: &str) -> Value {
    let mut device = of.clone();
    (device["id"], device["uuid"], device["device_name"]) = (json!(id), json!(uuid(id)), json!(name));
    device
}

/// Alike but for their identity, as many as are wanted.
pub fn many(count: u64) -> Vec<Value> {
    let one = &demo_fleet()[0];
    (1..=count).map(|id| sibling(one, id, &format!("gw-{id}"))).collect()
}

/// Devices with ids from 1 to `count`.
pub fn gateways(count: u64) -> Vec<Value> {
    (1..=count).map(gateway).collect()
}

/// A device whose uuid and name tell its id, of a fleet without tags.
pub fn gateway(id: u64) -> Value {
    json!({
        "id": id, "uuid": format!("{id:032x}"), "device_name": format!("gw-{id}"), "os_version": "balenaOS 6.1.24",
        "os_variant": "prod", "supervisor_version": "16.7.6", "is_connected_to_vpn": true, "is_web_accessible": true,
        "ip_address": "192.168.0.10", "is_of__device_type": [{"slug": "raspberrypi3"}],
        "image_install": [], "belongs_to__application": [{"id": 1, "app_name": "gateways", "slug": "acme/gateways",
            "organization": [{"handle": "acme"}], "application_tag": []}],
        "is_running__release": [{"id": 1, "commit": "c0ffee", "raw_version": "1.0.0"}], "device_tag": [],
    })
}

/// Lets a device run these services of its release.
pub fn run_services(device: &mut Value, names: &[&str]) {
    let Some(release) = device["is_running__release"][0]["id"].as_u64() else { return };
    for (number, name) in (1..).zip(names) {
        install(device, release, number, name, "Running", None);
    }
}

/// What the device should run from now on.
pub fn set_target(device: &mut Value, version: &str) {
    device["should_be_running__release"] = release_of(device, version);
}

/// A release of the device's fleet.
fn release_of(device: &Value, version: &str) -> Value {
    let slug = device["belongs_to__application"][0]["slug"].as_str().unwrap_or_default();
    let commit = &hex(&format!("{slug} {version}"))[..32];
    json!([{ "id": release_id(commit), "commit": commit, "raw_version": version }])
}

/// What the device runs from now on, and should.
pub fn set_release(device: &mut Value, version: &str) {
    let release = release_of(device, version);
    (device["is_running__release"], device["should_be_running__release"]) = (release.clone(), release);
    // The rows of the old release stay as `deleted`.
    let rows = device["image_install"].as_array_mut().map(Vec::as_mut_slice).unwrap_or_default();
    let mut names = Vec::new();
    for row in rows.iter_mut().filter(|row| row["status"] != "deleted") {
        let name = &row["installs__image"][0]["is_a_build_of__service"][0]["service_name"];
        names.push(name.as_str().expect("a name").to_owned());
        row["status"] = json!("deleted");
    }
    names.sort();
    names.dedup();
    names.reverse(); // node-exporter is the first of demo_fleet
    run_services(device, &names.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Id of the release that the device runs.
pub fn running_release(device: &Value) -> u64 {
    device["is_running__release"][0]["id"].as_u64().expect("a release")
}

/// Sets what a device has of an image of a release. There is one row for each image, for ever, and its id stays.
pub fn install(device: &mut Value, release: u64, number: u64, service: &str, status: &str, progress: Option<u32>) {
    let image = cloud::image_id(release, number);
    let id = device["id"].as_u64().expect("an id") * 1000;
    let rows = device["image_install"].as_array_mut().expect("a list");
    let known = rows.iter().position(|row| row["installs__image"][0]["id"] == image);
    let at = known.unwrap_or(rows.len());
    if known.is_none() {
        rows.push(json!({
            "id": id + at as u64,
            "installs__image": [{ "id": image, "is_a_build_of__service": [{ "id": number, "service_name": service }] }],
        }));
    }
    let row = &mut rows[at];
    (row["status"], row["download_progress"]) = (json!(status), json!(progress));
    row["is_provided_by__release"] = json!([{ "id": release }]);
}

pub fn set_tag(device: &mut Value, key: &str, value: &str) {
    let tags = device["device_tag"].as_array_mut().expect("a list of tags");
    tags.retain(|tag| tag["tag_key"] != key);
    tags.push(json!({ "tag_key": key, "value": value }));
}

fn device(fleet: &Fleet, number: u64, id: u64, name: &str) -> Value {
    let (organization, app_name) = fleet.slug.split_once('/').expect("a slug");
    let ((memory, storage), last) = (fleet.sizes, 10 + number);
    let mut device = json!({
        "id": id,
        "uuid": uuid(id),
        "device_name": name,
        "is_of__device_type": [{ "slug": fleet.device_type }],
        "belongs_to__application": [{
            "id": fleet.id,
            "app_name": app_name,
            "slug": fleet.slug,
            "organization": [{ "handle": organization }],
            "application_tag": [
                { "tag_key": "prometheus.io/interval", "value": "5s" },
                { "tag_key": fleet.tag.0, "value": fleet.tag.1 },
            ],
        }],
        "is_pinned_on__release": [],
        "device_tag": [],
        "os_version": "balenaOS 6.1.24",
        "os_variant": "prod",
        "supervisor_version": "16.7.6",
        "is_connected_to_vpn": true,
        "is_web_accessible": true,
        "ip_address": format!("{}.{last} fd12:3456:789a:1::{last:x}", fleet.lan),
        "public_address": "203.0.113.7",
        "memory_usage": memory / 4,
        "memory_total": memory,
        "storage_usage": storage / 5,
        "storage_total": storage,
        "cpu_usage": 7,
        "cpu_temp": 51,
        "is_undervolted": false,
        "api_heartbeat_state": "online",
        "last_vpn_event": "2026-11-22T06:59:32.104Z",
        "created_at": "2025-03-01T08:00:00.000Z",
        "update_status": "done",
        "last_update_status_event": "2026-11-20T17:41:05.311Z",
        "should_be_operated_by__release": [{ "id": 7, "raw_version": "6.1.24" }],
        "should_be_managed_by__release": [{ "id": 5, "raw_version": "16.7.6" }],
        "image_install": [],
    });
    set_release(&mut device, fleet.version);
    device
}

/// Of 62 digits on some, as balena once gave them.
fn uuid(id: u64) -> String {
    let digits = hex(&format!("device {id}")) + &hex(&format!("{id} device"));
    digits[..if id.is_multiple_of(6) { 62 } else { 32 }].to_owned()
}

fn hex(text: &str) -> String {
    Sha1::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}
