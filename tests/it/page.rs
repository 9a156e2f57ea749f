//! The page for people: what it shows, in which order, and how it is narrowed down.

use std::time::Instant;

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
    cloud.change(|devices| {
        find(devices, "fridge-01")["should_be_running__release"] = json!([{ "id": 7, "commit": "0" }])
    });
    let sidecar = sidecar(&cloud);
    let status = start(&sidecar);
    let page = status.text("/");
    let order = ["<h1>", "<dl>", "id=\"fleets\"", "id=\"q\"", "id=\"left-out\"", "id=\"offline\"", "id=\"listed\""];
    let places: Vec<_> = order.iter().map(|part| page.find(part).unwrap_or_else(|| panic!("no {part}"))).collect();
    assert!(places.is_sorted(), "{places:?}");
    assert!(page.contains("<title>baletheus: well</title>") && !page.contains("class=\"problems\""), "{page}");
    for (name, number) in [
        ("Devices", "25"),
        ("Targets", "25"),
        ("Offline", "<a href=\"/?q=offline\">3</a>"),
        ("Left out", "<a href=\"/?q=left+out\">1</a>"),
    ] {
        assert!(page.contains(&format!("<dt>{name}</dt><dd>{number}</dd>")), "{name} {number}: {page}");
    }
    assert_eq!(
        section(&page, "fleets"),
        [
            "city-lights/gateways 4 3 0 1",
            "city-lights/street-lamps 8 8 1 0",
            "polar-foods/cold-chain 9 9 1 0",
            "polar-foods/gateways 4 5 1 0"
        ]
    );
    let [left_out] = &*section(&page, "left-out") else { panic!("one device") };
    assert!(left_out.contains("the tag prometheus.io/scrape switches it off"), "{left_out}");
    assert_eq!(names(&page, "offline"), ["fridge-03", "gw-narvik", "lamp-0006"]);
    assert_eq!(names(&page, "listed").len(), 21);
    let listed = section(&page, "listed");
    let fridge = listed.iter().find(|row| row.starts_with("fridge-01")).expect("a row");
    assert!(fridge.contains("polar-foods/cold-chain online since") && fridge.contains("update pending"), "{fridge}");

    cloud.intercept(|_, _| Some(Reply::status(503, &[], b"under <repair>")));
    status.running.signal("HUP");
    status.running.wait_for("refresh failed");
    let page = wait_for_page(&status, "<title>baletheus: failing</title>");
    let (problems, dl) = (page.find("class=\"problems\"").expect("problems"), page.find("<dl>").unwrap());
    assert!(problems < dl && page.contains("The last refresh failed: ") && page.contains("&lt;repair&gt;"), "{page}");
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

#[test]
fn a_filter_narrows_it_down_and_is_shown_as_text() {
    let cloud = Cloud::start(demo_fleet());
    let uuid = cloud.change(|devices| find(devices, "gw-oslo")["uuid"].as_str().unwrap().to_owned());
    let sidecar = sidecar(&cloud);
    let status = start(&sidecar);
    let all = |query: &str| -> Vec<String> {
        let page = status.text(&format!("/?{query}"));
        ["left-out", "offline", "listed"].iter().flat_map(|id| names(&page, id)).collect()
    };
    assert_eq!(all("q=offline"), ["fridge-03", "gw-narvik", "lamp-0006"]);
    assert_eq!(all("q=OFFLINE+cold-chain"), ["fridge-03"]);
    assert_eq!(all("q=k%C3%BChlraum"), ["Kühlraum \"Süd\" & West".replace('&', "&amp;")]);
    assert_eq!(all(&format!("q={uuid}")), ["gw-oslo"]);
    assert_eq!(all("q=%2Finternal%2Fmetrics"), ["gw-oslo"]);
    assert_eq!(all("q=left+out"), ["bench &lt;test&gt; 🚧"]);
    assert_eq!(all("q=polar-foods%2Fgateways").len(), 4);
    assert_eq!(all("q=nothing-has-this"), [""; 0]);
    assert_eq!(all("q=&rows=all&unknown=%FF%00").len(), 25);

    let page = status.text("/?q=%22%3E%3Cscript%3Ealert(1)%3C/script%3E&refresh=off");
    assert!(!page.contains("<script") && page.contains("value=\"&quot;&gt;&lt;script"), "{page}");
    assert!(page.contains("0 of 25 devices match"), "{page}");
    // Links keep what is asked for.
    let page = status.text("/?q=gw+oslo&refresh=off");
    assert!(page.contains("href=\"/?q=gw+oslo\"") && page.contains("name=\"refresh\" value=\"off\""), "{page}");
}

#[test]
fn it_refreshes_by_itself_unless_it_is_stopped() {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud);
    let status = start(&sidecar);
    let (_, head, body) = status.get("/?q=fridge");
    assert!(head.contains("\r\nrefresh: 30\r\n"), "{head}");
    let page = String::from_utf8(body).expect("UTF-8");
    assert!(page.contains("<a href=\"/?q=fridge&amp;refresh=off\">Stop that</a>"), "{page}");
    let (_, head, _) = status.get("/?q=fridge&refresh=off");
    assert!(!head.contains("\r\nrefresh:"), "{head}");
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
        find(devices, "fridge-03")["last_connectivity_event"] = ago(3 * 86_400 + 60);
        find(devices, "gw-narvik")["last_connectivity_event"] = ago(5 * 3600 + 60);
        find(devices, "lamp-0006")["last_connectivity_event"] = ago(10 * 60 + 10);
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
    let listed = section(&page, "listed");
    let row = |name: &str| listed.iter().find(|row| row.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
    assert!(row("fridge-01").contains("node from option "), "{}", row("fridge-01"));
    assert!(row("lamp-0002").contains("lamp from fleet tag "), "{}", row("lamp-0002"));
    assert!(row("lamp-0001").contains("own from device tag ") && row("lamp-0001").ends_with(".balena:9001/path"));
    // Its own tag cannot be read, so that its fleet's holds.
    assert!(row("lamp-0004").contains("lamp from fleet tag "), "{}", row("lamp-0004"));
    assert!(row("gw-oslo").contains("app from device tag "), "{}", row("gw-oslo"));
}

#[test]
fn a_service_that_declares_an_exporter_is_named_and_found() {
    let cloud = Cloud::start(demo_fleet());
    let oslo = cloud.change(|devices| running_release(find(devices, "gw-oslo")));
    let fridge = cloud.change(|devices| running_release(find(devices, "fridge-01")));
    cloud.set_services(oslo, &[("vault", &[("prometheus.io.port", "9200")], &[])]);
    cloud.set_services(fridge, &[("freezer", &[("prometheus.io.port", "80"), ("prometheus.io.job", "cold")], &[])]);
    let sidecar = sidecar(&cloud).env("SERVICE_LABELS", "true");
    let status = start(&sidecar);
    let page = status.text("/?q=service+freezer");
    let [fridge] = &section(&page, "listed")[..1] else { panic!("{page}") };
    assert!(fridge.contains("cold from service freezer ") && fridge.ends_with(".balena:80"), "{fridge}");
    assert!(!names(&page, "listed").contains(&"gw-oslo".to_owned()), "{page}");
    let page = status.text("/?q=gw-oslo");
    assert!(section(&page, "listed")[0].contains("app from device tag "), "a tag beats labels: {page}");
}

#[test]
fn a_large_fleet_shows_its_first_rows_and_the_rest_on_demand() {
    let cloud = Cloud::start(many(1200));
    cloud.change(|devices| devices[..510].iter_mut().for_each(|device| device["is_online"] = json!(false)));
    let sidecar = sidecar(&cloud);
    let status = start(&sidecar);
    status.wait_until("a list", |metrics| metrics["baletheus_devices"] == 1200.0);
    let page = status.text("/");
    assert_eq!((section(&page, "offline").len(), section(&page, "listed").len()), (500, 500));
    assert!(page.contains("<p>10 more: ") && page.contains("<p>190 more: "), "{page}");
    assert!(page.contains("href=\"/?rows=all\""), "{page}");
    let page = status.text("/?rows=all");
    assert_eq!((section(&page, "offline").len(), section(&page, "listed").len()), (510, 690));
    let page = status.text("/?q=gw-1199");
    assert_eq!(names(&page, "listed"), ["gw-1199"], "the filter sees all rows");
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
    let known = "!DOCTYPE html head meta title link body header h1 p strong time main div dl dt dd section h2 span table thead tr \
        th tbody td small a form label input button bdi";
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
