//! `cargo run --example demo`, as the README has it: what it shows, and that nothing is left of it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::sidecar::{PATIENCE, Running};
use crate::support::tools;
use serde_json::Value;

/// The demo in a process group of its own, as a shell starts it.
struct Demo {
    /// Taken at its end.
    running: Option<Running>,
    group: u32,
}

impl Demo {
    /// Should a test be cut short, which its own group hides from the demo, it ends by itself.
    fn start(seconds: u32) -> Self {
        // What is not built yet may take its time.
        let build = tools::cargo("build").args(["--bin", "baletheus", "--example", "demo"]).status();
        assert!(build.expect("cargo runs").success());
        let mut command = tools::cargo("run");
        command.args(["--example", "demo", "--", "--seconds", &seconds.to_string()]).process_group(0);
        let running = Running::spawn(command);
        Self { group: running.id(), running: Some(running) }
    }

    fn wait_for(&self, text: &str) -> String {
        self.running.as_ref().expect("it runs").wait_for(text)
    }

    /// The target file that it tells of.
    fn list(&self) -> PathBuf {
        let line = self.wait_for("the target file is");
        PathBuf::from(line.rsplit(' ').next().expect("a path"))
    }

    /// Expects that it ends well, and that no process and no file of it is left.
    fn expect_end(mut self, list: &Path) {
        let deadline = Instant::now() + PATIENCE;
        while self.processes().len() > 1 {
            assert!(Instant::now() < deadline, "still there: {:?}", self.processes());
            thread::sleep(Duration::from_millis(20));
        }
        let (status, log) = self.running.take().expect("it runs").wait();
        assert!(status.success(), "{status}\n{}", log.join("\n"));
        assert_eq!(self.processes(), [""; 0]);
        assert!(!list.parent().expect("a folder").exists());
    }

    /// All of its group, with their commands.
    fn processes(&self) -> Vec<String> {
        let output = Command::new("ps").args(["-A", "-o", "pgid=,pid=,args="]).output().expect("ps is there");
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        let group = self.group.to_string();
        lines.lines().filter(|line| line.split_whitespace().next() == Some(&group)).map(str::to_owned).collect()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if self.running.is_some() {
            let _ = Command::new("kill").args(["-s", "KILL", "--", &format!("-{}", self.group)]).status();
        }
    }
}

fn kill(signal: &str, whom: &str) {
    let sent = Command::new("kill").args(["-s", signal, "--", whom]).status().expect("kill is there");
    assert!(sent.success(), "kill -s {signal} {whom}");
}

fn get(url: &str) -> Value {
    // reqwest asks for a TLS provider, even for http.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::blocking::Client::builder().no_proxy().build().expect("a client");
    let text = client.get(url).send().and_then(reqwest::blocking::Response::text).expect("an answer");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("GET {url}: {error}: {text}"))
}

#[test]
fn shows_a_fleet_until_ctrl_c() {
    let demo = Demo::start(300);
    demo.wait_for("updated balena.json: 25 targets of 24 devices (+24 -0 ~0), 1 device left out");
    let list = demo.list();
    let groups: Value = serde_json::from_slice(&fs::read(&list).expect("the target file")).expect("JSON");
    assert_eq!(groups.as_array().map(Vec::len), Some(25));
    assert_eq!(groups[0]["labels"]["device_name"], "fridge-01");

    let line = demo.wait_for("shows the devices at");
    let url = line.rsplit(' ').next().and_then(|url| url.strip_suffix("/targets")).expect("a URL").to_owned();
    // Of 25 targets, three are offline.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let up = get(&format!("{url}/api/v1/query?query=sum(up)"))["data"]["result"][0]["value"][1].clone();
        if up == "22" {
            break;
        }
        assert!(Instant::now() < deadline, "{up} targets are up");
        thread::sleep(Duration::from_millis(100));
    }
    demo.wait_for("now runs release");
    demo.wait_for("updated balena.json: 26 targets of 24 devices (+0 -0 ~1)");
    kill("INT", &format!("-{}", demo.group));
    demo.expect_end(&list);
}

#[test]
fn ends_when_it_alone_is_told_to() {
    let demo = Demo::start(300);
    demo.wait_for("shows the devices at");
    let list = demo.list();
    assert!(demo.processes().len() > 2, "the demo, baletheus and Prometheus: {:?}", demo.processes());
    kill("TERM", &demo.group.to_string());
    demo.expect_end(&list);
}

#[test]
fn ends_by_itself_where_that_is_asked_for() {
    let demo = Demo::start(1);
    let list = demo.list();
    demo.expect_end(&list);
}
