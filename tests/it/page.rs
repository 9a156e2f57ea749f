//! The page for people: what it shows, and in which order.

use std::sync::Arc;
use std::time::Instant;

use crate::options::running::proxy_to;
use crate::support::cloud::{Cloud, Reply};
use crate::support::fleet::{demo_fleet, find, many, running_release, set_tag};
use crate::support::sidecar::{PATIENCE, Sidecar};
use crate::support::status::{Status, sidecar};
use regex::Regex;
use serde_json::{Value, json};

fn start(sidecar: &Sidecar) -> Status {
    let status = Status::start(sidecar);
    status.wait_until("vitals", |metrics| metrics.keys().any(|name| name.starts_with("balena_device_online")));
    status
}

/// The rows of a section, as text without markup. The name of the device ends before the first blank.
fn section(page: &str, id: &str) -> Vec<String> {
    let Some((_, rest)) = page.split_once(&format!("<section aria-labelledby=\"{id}\">")) else { return Vec::new() };
    let (section, _) = rest.split_once("</section>").expect("its end");
    let markup = Regex::new("<[^>]*>").unwrap();
    let rows = section.lines().filter(|line| line.starts_with("<tr>"));
    rows.map(|row| markup.replace_all(row, " ").split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

fn names(page: &str, id: &str) -> Vec<String> {
    section(page, id).iter().map(|row| row.split(" (").next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn what_is_wrong_comes_first_with_its_reason() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    let status = start(&sidecar);
    let page = status.text("/");
    let order = ["<h1>", "id=\"left-out\"", "id=\"offline\"", "id=\"devices\""];
    let places: Vec<_> = order.iter().map(|part| page.find(part).unwrap_or_else(|| panic!("no {part}"))).collect();
    assert!(places.is_sorted(), "{places:?}");
    assert!(page.contains("<title>baletheus: well</title>") && !page.contains("class=\"problems\""), "{page}");
    assert!(page.contains("Devices: 25. Targets: 25."), "{page}");
    let [left_out] = &*section(&page, "left-out") else { panic!("one device") };
    assert!(left_out.contains("the tag prometheus.io/scrape switches it off"), "{left_out}");
    assert_eq!(names(&page, "offline"), ["fridge-03", "gw-narvik", "lamp-0006"]);
    assert_eq!(names(&page, "devices").len(), 21);
    let listed = section(&page, "devices");
    let fridge = listed.iter().find(|row| row.starts_with("fridge-01")).expect("a row");
    assert!(fridge.contains("polar-foods/cold-chain online since"), "{fridge}");

    cloud.intercept(|_, _| Some(Reply::status(503, &[], b"under <repair>")));
    status.running.signal("HUP");
    status.running.wait_for("refresh failed");
    let page = wait_for_page(&status, "<title>baletheus: failing</title>");
    let problems = page.find("class=\"problems\"").expect("problems");
    assert!(
        problems < page.find("id=\"left-out\"").expect("a table")
            && page.contains("The last refresh failed: ")
            && page.contains("&lt;repair&gt;"),
        "{page}"
    );
    assert_eq!(names(&page, "offline").len(), 3, "the list stays");
}

fn wait_for_page(status: &Status, text: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let page = status.text("/");
        if page.contains(text) {
            return page;
        }
        assert!(Instant::now() < deadline, "{text} is not in {page}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn before_the_first_list_and_without_a_device_it_says_so() {
    let cloud = Cloud::start(Vec::new());
    cloud.intercept(|_, _| Some(Reply::status(401, &[], b"")));
    let sidecar = sidecar(&cloud);
    let status = Status::start(&sidecar);
    let page = wait_for_page(&status, "The last refresh failed: ");
    assert!(page.contains("There is no list yet") && page.contains("401"), "{page}");
    cloud.heal();
    status.running.signal("HUP");
    wait_for_page(&status, "The API lists no device for this key and these options.");
}

/// Only balenaCloud has pages of devices; the sidecar does not know the dashboard of an openBalena.
#[test]
fn each_device_leads_to_its_page_in_balenacloud() {
    let cloud = Arc::new(Cloud::start(demo_fleet()));
    let uuid = cloud.change(|devices| find(devices, "gw-oslo")["uuid"].as_str().unwrap().to_owned());
    let own = sidecar(&cloud);
    assert!(!start(&own).text("/").contains("<a href=\"http"));
    let proxy = proxy_to(&cloud); // so that nothing leaves this machine
    let named = sidecar(&cloud).env("BALENA_API_URL", "http://api.balena-cloud.com").env("HTTP_PROXY", proxy.url());
    let page = start(&named).text("/");
    let link = format!("<a href=\"https://dashboard.balena-cloud.com/devices/{uuid}/summary\"><bdi>gw-oslo");
    assert!(page.contains(&link), "{link}: {page}");
    assert_eq!(page.matches("<a href=\"https://dashboard.balena-cloud.com/devices/").count(), 25);
}

#[test]
fn it_has_no_script_and_no_style_within_it() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    let status = start(&sidecar);
    let page = status.text("/");
    // There is no script and no style within it, so that the content security policy holds.
    assert!(!page.contains("<script") && !page.contains("<style") && !page.contains(" style="), "{page}");
    let (code, head, css) = status.get("/style.css");
    assert!(code == 200 && head.contains("content-type: text/css") && css.starts_with(b":root"), "{head}");
}

#[test]
fn times_are_relative_and_exact() {
    let cloud = Cloud::start(demo_fleet());
    let ago = |seconds| {
        let time = std::time::SystemTime::now() - std::time::Duration::from_secs(seconds);
        Value::from(humantime::format_rfc3339_millis(time).to_string())
    };
    cloud.change(|devices| {
        find(devices, "fridge-03")["last_vpn_event"] = ago(3 * 86_400 + 60);
        find(devices, "gw-narvik")["last_vpn_event"] = ago(5 * 3600 + 60);
        find(devices, "lamp-0006")["last_vpn_event"] = ago(10 * 60 + 10);
    });
    let sidecar = sidecar(&cloud);
    let status = start(&sidecar);
    let page = status.text("/");
    let rows = section(&page, "offline");
    for (row, since) in rows.iter().zip(["since 3 days ago", "since 5 h ago", "since 10 min ago"]) {
        assert!(row.contains(since), "{since}: {row}");
    }
    let exact =
        Regex::new(r#"<time datetime="20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ" title="[^"]+">\d+ s ago</time>"#).unwrap();
    assert!(exact.is_match(&page), "the last refresh: {page}");
}

#[test]
fn each_target_says_where_it_comes_from() {
    let cloud = Cloud::start(demo_fleet());
    cloud.change(|devices| {
        let tag = json!({ "tag_key": "prometheus.io/exporters", "value": "lamp:9000" });
        for device in devices.iter_mut() {
            if device["belongs_to__application"][0]["slug"] == "city-lights/street-lamps" {
                device["belongs_to__application"][0]["application_tag"] = json!([tag]);
            }
        }
        set_tag(find(devices, "lamp-0001"), "prometheus.io/exporters", "own:9001/path");
    });
    let sidecar = sidecar(&cloud);
    let status = start(&sidecar);
    let page = status.text("/");
    let listed = section(&page, "devices");
    let row = |name: &str| listed.iter().find(|row| row.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
    assert!(row("fridge-01").contains("node from option "), "{}", row("fridge-01"));
    assert!(row("lamp-0002").contains("lamp from fleet tag "), "{}", row("lamp-0002"));
    assert!(row("lamp-0001").contains("own from device tag ") && row("lamp-0001").ends_with(".balena:9001/path"));
    // Its own tag cannot be read, so that its fleet's holds.
    assert!(row("lamp-0004").contains("lamp from fleet tag "), "{}", row("lamp-0004"));
    assert!(row("gw-oslo").contains("app from device tag "), "{}", row("gw-oslo"));
}

#[test]
fn a_service_that_declares_an_exporter_is_named() {
    let cloud = Cloud::start(demo_fleet());
    let oslo = cloud.change(|devices| running_release(find(devices, "gw-oslo")));
    let fridge = cloud.change(|devices| running_release(find(devices, "fridge-01")));
    cloud.set_services(oslo, &[("vault", &[("prometheus.io.port", "9200")], &[])]);
    cloud.set_services(fridge, &[("freezer", &[("prometheus.io.port", "80"), ("prometheus.io.job", "cold")], &[])]);
    let sidecar = sidecar(&cloud).env("SERVICE_LABELS", "true");
    let status = start(&sidecar);
    let rows = section(&status.text("/"), "devices");
    let row = |name: &str| rows.iter().find(|row| row.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
    assert!(row("fridge-01").contains("cold from service freezer ") && row("fridge-01").ends_with(".balena:80"));
    assert!(row("gw-oslo").contains("app from device tag "), "a tag beats labels: {}", row("gw-oslo"));
}

#[test]
fn a_large_fleet_shows_its_first_rows_and_counts_the_rest() {
    let cloud = Cloud::start(many(2200));
    cloud.change(|devices| devices[..1010].iter_mut().for_each(|device| device["is_connected_to_vpn"] = json!(false)));
    let sidecar = sidecar(&cloud);
    let status = start(&sidecar);
    status.wait_until("a list", |metrics| metrics["baletheus_devices"] == 2200.0);
    let page = status.text("/");
    assert_eq!((section(&page, "offline").len(), section(&page, "devices").len()), (1000, 1000));
    assert!(page.contains("<p>10 more: ") && page.contains("<p>190 more: "), "{page}");
}

#[test]
fn what_devices_call_themselves_is_text() {
    let cloud = Cloud::start(demo_fleet());
    let names =
        ["<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "a\u{202e}b", "x</bdi></table>", "\u{1b}[31m"];
    cloud.change(|devices| {
        for (device, name) in devices.iter_mut().zip(names) {
            device["device_name"] = json!(name);
        }
        devices[5]["belongs_to__application"][0]["slug"] = json!("a\"><script>/b");
        devices[6]["api_heartbeat_state"] = json!("<script>");
    });
    let sidecar = sidecar(&cloud);
    let status = start(&sidecar);
    let page = status.text("/");
    let tags = Regex::new("<(/?[a-zA-Z0-9!]+)").unwrap();
    let known = "!DOCTYPE html head meta title link body header h1 p strong time main div section h2 span table thead tr \
        th tbody td small a bdi";
    let unknown: Vec<_> = tags
        .captures_iter(&page)
        .map(|tag| tag[1].trim_start_matches('/').to_owned())
        .filter(|tag| !known.split_whitespace().any(|known| known == tag))
        .collect();
    assert_eq!(unknown, [""; 0], "{page}");
    assert!(
        page.contains("<bdi>&lt;script&gt;alert(1)&lt;/script&gt; (") && page.contains("<bdi>a\u{202e}b ("),
        "{page}"
    );
    for tag in ["bdi", "table", "section", "a "] {
        let close = format!("</{}>", tag.trim());
        assert_eq!(page.matches(&format!("<{tag}")).count(), page.matches(&close).count(), "{tag}");
    }
}
