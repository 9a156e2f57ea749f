//! What runs on each device, and its updates, in the metrics: as recorded from a real server, and when something fails.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::cloud::{Cloud, Reply, Seen, recorded_services};
use crate::support::fleet::{self, demo_fleet, install};
use crate::support::recording::Recording;
use crate::support::sidecar::{PATIENCE, Sidecar, finish};
use crate::support::status::{self, Status};
use serde_json::{Value, json};

/// The services and updates of the recorded fleet, device by device, as its README describes them: services that run, that do not run,
/// their statuses, and downloads.
const RECORDED: [(u64, &str); 15] = [
    (1, "running 3, not running 0"),
    (2, "running 2, not running 1, app exited"),
    (3, "running 3, not running 0, app at 0.37, db at 1, node-exporter at 0, update downloading"),
    (4, "running 0, not running 3, app Starting, db Installed, node-exporter Installing, update applying changes"),
    (5, "running 0, not running 3, app Dead, db paused, node-exporter restarting"),
    (6, "update downloading"),
    (7, "running 0, update rejected, update failed"),
    (8, "running 3, not running 0, db at 1, node-exporter at 1, update aborted, update failed"),
    (9, "running 0"),
    (10, "running 3, not running 0, OS pending, supervisor pending"),
    (11, ""),
    (12, "running 3, not running 0"),
    (13, "running 2, not running 0"),
    (14, "running 0, not running 3, app Idle, db Stopped, node-exporter Unknown"),
    (15, "running 2, not running 1, app Handing over, app at 1, db at 1, node-exporter at 1, update applying changes"),
];

/// The images of the releases of the recorded fleet, each with its service.
const IMAGES: [(u64, &[(u64, &str)]); 4] = [
    (2, &[(4, "app"), (5, "node-exporter")]),
    (3, &[(6, "app"), (7, "db"), (8, "node-exporter")]),
    (4, &[(9, "app"), (10, "db"), (11, "node-exporter")]),
    (9, &[(16, "app"), (10, "db")]),
];

fn recorded() -> Cloud {
    let cloud = Cloud::start(recorded_services());
    for (release, images) in IMAGES {
        let image = |(id, name): &(u64, &str)| {
            json!({ "id": id, "image_label": [], "image": [{ "id": id,
                "is_a_build_of__service": [{ "id": id, "service_name": name, "service_label": [] }] }] })
        };
        cloud.set_images(release, images.iter().map(image).collect());
    }
    cloud
}

/// With the labels of services, as by default.
fn start(cloud: &Cloud) -> Sidecar {
    status::sidecar(cloud).env("SERVICE_LABELS", "true")
}

fn uuid(id: u64) -> String {
    format!("{id:032x}")
}

/// What the metrics say of a device, in the words of [`RECORDED`].
fn shown(metrics: &BTreeMap<String, f64>, uuid: &str) -> String {
    let of = |name: &'static str| {
        let start = format!("balena_device_{name}{{uuid=\"{uuid}\"");
        metrics.iter().filter_map(move |(sample, value)| Some((sample.strip_prefix(&start)?.to_owned(), *value)))
    };
    let label = |labels: &str, name: &str| {
        let value = labels.split_once(&format!("{name}=\"")).expect("the label").1;
        value.split('"').next().expect("a value").to_owned()
    };
    let mut parts = Vec::new();
    parts.extend(of("services_running").map(|(_, count)| format!("running {count}")));
    parts.extend(of("services_not_running").map(|(_, count)| format!("not running {count}")));
    let status = |(labels, one): (String, f64)| {
        assert_eq!(one, 1.0);
        let muted = if labels.contains(",alert=\"false\"") { " muted" } else { "" };
        format!("{} {}{muted}", label(&labels, "service"), label(&labels, "status"))
    };
    parts.extend(of("service_status").map(status));
    parts.extend(
        of("service_download_ratio").map(|(labels, ratio)| format!("{} at {ratio}", label(&labels, "service"))),
    );
    parts.extend(of("update_status").map(|(labels, _)| format!("update {}", label(&labels, "status"))));
    for (name, text) in [
        ("update_failed", "update failed"),
        ("os_update_pending", "OS pending"),
        ("supervisor_update_pending", "supervisor pending"),
    ] {
        parts.extend(of(name).filter(|(_, is_so)| *is_so == 1.0).map(|_| text.to_owned()));
    }
    parts.join(", ")
}

fn known(metrics: &BTreeMap<String, f64>) -> bool {
    metrics.keys().any(|name| name.starts_with("balena_device_services_running"))
}

fn has_services(metrics: &BTreeMap<String, f64>) -> bool {
    metrics.keys().any(|name| name.starts_with("balena_device_service"))
}

/// Waits until the metrics say this of a device.
fn wait_for(status: &Status, uuid: &str, expected: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = shown(&status.metrics(), uuid);
        if found == expected {
            return;
        }
        assert!(Instant::now() < deadline, "expected: {expected}\n   found: {found}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Rows of one device, as a recording has them.
fn rows(name: &str) -> Value {
    let body = Recording::read(&format!("services/{name}")).answer.body;
    serde_json::from_slice::<Value>(&body).expect("JSON")["d"].take()
}

#[test]
fn a_recorded_fleet_shows_what_runs_and_what_does_not() {
    let cloud = recorded();
    let sidecar = start(&cloud);
    let status = Status::start(&sidecar);
    let metrics = status.wait_until("services", known);
    for (id, expected) in RECORDED {
        assert_eq!(shown(&metrics, &uuid(id)), expected, "device {id}");
    }
    let value = |name: &str, id: u64| metrics.get(&format!("balena_device_{name}{{uuid=\"{}\"}}", uuid(id))).copied();
    // Known and well is 0, and never absent.
    assert_eq!((value("update_failed", 1), value("update_failed", 11)), (Some(0.0), None), "device 11 never reported");
    assert_eq!((value("os_update_pending", 1), value("supervisor_update_pending", 1)), (Some(0.0), Some(0.0)));
    assert_eq!(value("provisioned_timestamp_seconds", 6), Some(1_740_816_000.0)); // 2025-03-01T08:00Z
    assert_eq!(value("last_update_status_event_timestamp_seconds", 6), Some(1_755_166_290.0)); // 2025-08-14T10:11:30Z
    assert_eq!(value("last_connectivity_event_timestamp_seconds", 6), Some(1_755_166_800.0)); // 2025-08-14T10:20Z
    assert_eq!((value("online", 1), value("online", 6)), (Some(1.0), Some(0.0)));

    // Nothing is asked for again that has not changed.
    cloud.clear_requests();
    let requests = cloud.wait_for_requests(12, PATIENCE);
    let about = |seen: &&Seen| seen.target.contains("image_install");
    let asked: Vec<_> = requests.iter().filter(about).collect();
    assert!(asked.len() >= 2 && asked.iter().all(|seen| seen.status == 304), "{asked:#?}");
}

#[test]
fn an_update_shows_each_step_that_was_recorded() {
    const STEPS: [(&str, u64, u64, &str); 9] = [
        ("update-1-before", 3, 3, "running 3, not running 0"),
        ("update-2-queued", 3, 4, "running 3, not running 0, app at 0, db at 0, node-exporter at 0"),
        ("update-3-downloading", 3, 4, "running 3, not running 0, app at 0.37, db at 0.81, node-exporter at 1"),
        ("update-4-downloaded", 3, 4, "running 3, not running 0, app at 1, db at 1, node-exporter at 1"),
        (
            "update-5-replacing",
            3,
            4,
            "running 1, not running 2, app Stopping, node-exporter Downloaded, app at 1, db at 1, node-exporter at 1",
        ),
        (
            "update-6-starting",
            3,
            4,
            "running 0, not running 3, app Downloaded, db Downloaded, node-exporter Downloaded, app at 1, db at 1",
        ),
        ("update-7-cleanup", 3, 4, "running 0, not running 3, app Deleting, db Deleting, node-exporter Deleting"),
        ("update-8-done", 4, 4, "running 3, not running 0"),
        // The old rows come back.
        ("update-9-rolled-back", 3, 3, "running 3, not running 0"),
    ];
    let cloud = recorded();
    let set = |name: &str, running: u64, target: u64| {
        let mut device = recorded_services().into_iter().find(|device| device["id"] == 12).expect("device 12");
        device["image_install"] = rows(name);
        device["is_running__release"] = json!([{ "id": running, "commit": "c0ffee", "raw_version": "1" }]);
        device["should_be_running__release"] = json!([{ "id": target }]);
        cloud.change(|devices| *devices = vec![device]);
    };
    set(STEPS[0].0, 3, 3);
    let sidecar = start(&cloud);
    let status = Status::start(&sidecar);
    for (name, running, target, expected) in STEPS {
        set(name, running, target);
        wait_for(&status, &uuid(12), expected);
    }
    // Another fleet's device: the rows are deleted, and its release is the old one.
    set("moved-to-another-fleet", 3, 3);
    wait_for(&status, &uuid(12), "running 0");
}

#[test]
fn an_image_that_is_shared_counts_as_recorded_before_and_after_the_update() {
    let cloud = recorded();
    let set = |running: u64| {
        let mut device = recorded_services().remove(0);
        device["image_install"] = rows("shared-image-after-update");
        device["is_running__release"] = json!([{ "id": running, "commit": "c0ffee", "raw_version": "1" }]);
        device["should_be_running__release"] = json!([{ "id": 9 }]);
        cloud.change(|devices| *devices = vec![device]);
    };
    // Release 9 has `app` and the `db` of release 4, whose `app` is deleted. The supervisor's own service is of neither.
    set(9);
    let sidecar = start(&cloud);
    let status = Status::start(&sidecar);
    wait_for(&status, &uuid(1), "running 2, not running 0");
    // Until the supervisor says that it runs release 9, only `db` is of the release that runs.
    set(4);
    wait_for(&status, &uuid(1), "running 1, not running 0");
}

/// The row of an image that two releases share belongs to the newer one as soon as that is downloaded.
#[test]
fn a_shared_image_counts_for_the_release_that_runs() {
    let cloud = recorded();
    let edit = |status: &'static str| {
        cloud.change(move |devices| {
            let device = devices.iter_mut().find(|device| device["id"] == 1).expect("device 1");
            device["should_be_running__release"] = json!([{ "id": 9 }]);
            let db = &mut device["image_install"][1];
            assert_eq!(db["installs__image"][0]["id"], 10);
            (db["is_provided_by__release"], db["status"]) = (json!([{ "id": 9 }]), json!(status));
        });
    };
    edit("Running");
    let sidecar = start(&cloud);
    let status = Status::start(&sidecar);
    wait_for(&status, &uuid(1), "running 3, not running 0");
    edit("exited");
    wait_for(&status, &uuid(1), "running 2, not running 1, db exited");
    drop(status);
    // Where labels of services are not read, the images of a release are not known, and what it says is the same.
    let sidecar = start(&cloud).env("SERVICE_LABELS", "false");
    let status = Status::start(&sidecar);
    wait_for(&status, &uuid(1), "running 2, not running 1, db exited");
    edit("Running");
    wait_for(&status, &uuid(1), "running 3, not running 0");
}

#[test]
fn what_fails_leaves_no_series_of_services_and_costs_nothing_else() {
    let cloud = recorded();
    let sidecar = start(&cloud).env("DEVICE_METRICS", "true");
    let status = Status::start(&sidecar);
    let read = "baletheus_last_services_refresh_timestamp_seconds";
    let metrics = status.wait_until("services", known);
    assert!(metrics[read] > 1.7e9);
    cloud.deny(Some("image_install"));
    let metrics = status.wait_until("no services", |metrics| !has_services(metrics));
    assert!(metrics.keys().any(|name| name.starts_with("balena_device_online")), "{metrics:#?}");
    let line = status.running.wait_for("cannot renew the services of the devices");
    assert!(line.contains("401") && line.contains("--device-services=false (DEVICE_SERVICES=false)"), "{line}");
    let (before, state) = (metrics[read], metrics["baletheus_last_device_refresh_timestamp_seconds"]);
    let metrics = status.wait_until("further states", |metrics| {
        metrics["baletheus_last_device_refresh_timestamp_seconds"] > state + 2.0
    });
    assert_eq!(metrics[read], before, "its age can be seen");
    assert_eq!(metrics["baletheus_refresh_failures_total{reason=\"unauthorized\"}"], 0.0);
    cloud.deny(None);
    status.running.wait_for("the services of the devices can be renewed again");
    status.wait_until("services", known);
    let log = status.running.log().join("\n");
    assert_eq!(log.matches("cannot renew").count(), 1, "{log}");

    // A server that does not know the resource.
    cloud.intercept(|seen, _| seen.target.contains("image_install").then(|| Reply::status(404, &[], b"")));
    let sidecar = start(&cloud);
    let status = Status::start(&sidecar);
    status.running.wait_for("cannot renew the services of the devices");
    let metrics = status.metrics();
    assert!(!has_services(&metrics) && metrics[read] == 0.0);
    drop(status);
    let cloud = recorded();
    let sidecar = start(&cloud).env("DEVICE_SERVICES", "false");
    let status = Status::start(&sidecar);
    status.wait_until("states", |metrics| metrics.keys().any(|name| name.starts_with("balena_device_update_failed")));
    let metrics = status.metrics();
    assert!(!has_services(&metrics) && !metrics.contains_key(read));
    assert!(!cloud.requests().iter().any(|seen| seen.target.contains("image_install")));
}

#[test]
fn a_server_that_does_not_know_a_field_gives_the_others() {
    let cloud = recorded();
    cloud.intercept(|seen, _| seen.target.contains("update_status").then(|| Reply::status(500, &[], b"")));
    let sidecar = start(&cloud);
    let status = Status::start(&sidecar);
    let line = status.running.wait_for("the API refuses");
    assert!(line.contains("refuses update_status,last_update_status_event of devices"), "{line}");
    let metrics = status.wait_until("services", known);
    assert_eq!(shown(&metrics, &uuid(10)), "running 3, not running 0, OS pending, supervisor pending");
    assert_eq!(shown(&metrics, &uuid(7)), "running 0");
    let state = metrics["baletheus_last_device_refresh_timestamp_seconds"];
    status.wait_until("another state", |metrics| {
        metrics["baletheus_last_device_refresh_timestamp_seconds"] > state + 2.0
    });
    let log = status.running.log().join("\n");
    assert_eq!(log.matches("the API refuses").count(), 1, "{log}");
    assert!(!log.contains("cannot renew"), "{log}");

    // A key that may not read the releases of the host loses these two only.
    cloud.intercept(|seen, _| seen.target.contains("should_be_operated").then(|| Reply::status(401, &[], b"")));
    let sidecar = start(&cloud);
    let status = Status::start(&sidecar);
    let line = status.running.wait_for("the API refuses");
    assert!(line.contains("refuses os_version, should_be_operated_by__release of devices"), "{line}");
    let metrics = status.wait_until("services", known);
    assert_eq!(shown(&metrics, &uuid(10)), "running 3, not running 0, supervisor pending");
}

#[test]
fn names_that_a_key_may_not_read_are_said_once_and_services_are_counted() {
    for denied in ["service", "image"] {
        let cloud = recorded();
        cloud.deny(Some(denied));
        let sidecar = start(&cloud);
        let status = Status::start(&sidecar);
        status.running.wait_for("the API does not name the service");
        let metrics = status.wait_until("services", known);
        assert_eq!(shown(&metrics, &uuid(2)), "running 2, not running 1", "{denied}");
        let state = metrics["baletheus_last_services_refresh_timestamp_seconds"];
        status.wait_until("more", |metrics| metrics["baletheus_last_services_refresh_timestamp_seconds"] > state + 2.0);
        assert_eq!(status.running.log().join("\n").matches("the API does not name").count(), 1);
    }
}

/// Nothing of it is claimed while a device is offline, and of a device's own key only what it sees.
#[test]
fn an_offline_device_says_nothing_of_its_services() {
    let cloud = recorded();
    let sidecar = start(&cloud);
    let status = Status::start(&sidecar);
    wait_for(&status, &uuid(2), "running 2, not running 1, app exited");
    cloud.change(|devices| devices[1]["is_connected_to_vpn"] = json!(false));
    wait_for(&status, &uuid(2), "");
    cloud.change(|devices| devices[1]["is_connected_to_vpn"] = json!(true));
    wait_for(&status, &uuid(2), "running 2, not running 1, app exited");
}

/// A service that is meant to end has a label. A status that nobody knows, and one with quotes, are taken as they are.
#[test]
fn a_label_leaves_a_service_out_of_the_alerts() {
    let mut devices = demo_fleet();
    devices.retain(|device| device["device_name"] == "gw-oslo");
    let device = &mut devices[0];
    device["image_install"] = json!([]);
    let release = fleet::running_release(device);
    let uuid = device["uuid"].as_str().expect("a uuid").to_owned();
    for (number, name, status) in [(1, "app", "Running"), (2, "migrate", "exited"), (3, "job", "a \"new\" one")] {
        install(device, release, number, name, status, None);
    }
    // The supervisor's own, and what is left of another release.
    install(device, 77, 1, "balena-supervisor", "exited", None);
    let cloud = Cloud::start(devices);
    cloud.set_services(
        release,
        &[
            ("app", &[], &[]),
            ("migrate", &[("prometheus.io.alert", "false")], &[]),
            ("job", &[("prometheus.io.alert", "perhaps")], &[]),
        ],
    );
    let sidecar = start(&cloud);
    let status = Status::start(&sidecar);
    let metrics = status.wait_until("services", known);
    let samples: Vec<_> = metrics.keys().filter(|name| name.starts_with("balena_device_service_status")).collect();
    assert_eq!(
        samples,
        [
            &format!("balena_device_service_status{{uuid=\"{uuid}\",service=\"job\",status=\"a \\\"new\\\" one\"}}"),
            &format!(
                "balena_device_service_status{{uuid=\"{uuid}\",service=\"migrate\",status=\"exited\",alert=\"false\"}}"
            ),
        ]
    );
    let line = status.running.wait_for("prometheus.io.alert is \"perhaps\"");
    assert!(line.contains("service job of release") && line.contains("counts as absent"), "{line}");
}

/// The page and `check --json` have the services that do not run.
#[test]
fn the_page_and_check_show_what_does_not_run() {
    let cloud = recorded();
    let sidecar = start(&cloud);
    let status = Status::start(&sidecar);
    status.wait_until("services", known);
    let page = status.text("/");
    let row = |name: &str| {
        page.lines().find(|line| line.contains(&format!("<bdi>{name} "))).unwrap_or_else(|| panic!("{name}: {page}"))
    };
    assert!(row("one-exited").contains("<div class=\"bad\">app: exited</div>"), "{page}");
    assert!(
        row("update-rejected")
            .contains("<div class=\"bad\">update rejected</div><div class=\"soft\">services not reported</div>"),
        "{page}"
    );
    assert!(!row("all-running").contains("class=\"bad\""), "{page}");

    let mut command = sidecar.command();
    command.args(["check", "--json", "--tunnel-url", "http://127.0.0.1:9"]).env("EXPORTERS", "node:80");
    let output = finish(command);
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let services = |name: &str| {
        let row = rows.iter().find(|row| row["device"].as_str().is_some_and(|device| device.starts_with(name)));
        row.expect("a row")["services_not_running"].clone()
    };
    assert_eq!(services("one-exited"), json!([{ "service": "app", "status": "exited" }]));
    assert_eq!((services("all-running"), services("update-rejected")), (json!([]), Value::Null));
    cloud.deny(Some("image_install"));
    let mut command = sidecar.command();
    command.args(["check", "--json", "--tunnel-url", "http://127.0.0.1:9"]).env("EXPORTERS", "node:80");
    let output = finish(command);
    let log = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(log.contains("cannot read the services of the devices") && log.contains("401"), "{log}");
}
