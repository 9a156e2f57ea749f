"""What one would write in an evening: Python with requests and json."""
import json, os, re, signal, sys, tempfile

import requests

PAGE = 1000
FIELDS = "id,uuid,device_name,os_version,os_variant,supervisor_version"
EXPAND = ("is_of__device_type($select=slug),belongs_to__application($select=id,app_name,slug;"
          "$expand=organization($select=handle),application_tag($select=tag_key,value)),"
          "is_running__release($select=commit,raw_version),device_tag($select=tag_key,value)")
session = requests.Session()
session.headers["Authorization"] = "Bearer " + os.environ["API_KEY"]

def devices(after=0):
    while True:
        query = f"$select={FIELDS}&$expand={EXPAND}&$filter=(id%20gt%20{after})&$orderby=id%20asc&$top={PAGE}"
        answer = session.get(f"{os.environ['BALENA_API_URL']}/v7/device?{query}", timeout=60)
        answer.raise_for_status()
        page = answer.json()["d"]
        yield from page
        if len(page) < PAGE:
            return
        after = page[-1]["id"]

def group(device):
    first = lambda reference: (reference or [{}])[0]
    kind, fleet, release = (first(device[name]) for name in ("is_of__device_type", "belongs_to__application", "is_running__release"))
    labels = {name: device[name] for name in ("device_name", "uuid", "os_version", "os_variant", "supervisor_version")}
    labels |= {"device_type": kind.get("slug"), "fleet": fleet.get("slug"), "commit": release.get("commit"),
               "__meta_balena_device_id": str(device["id"]), "__meta_balena_fleet_name": fleet.get("app_name"),
               "__meta_balena_fleet_id": str(fleet["id"]) if fleet else None,
               "__meta_balena_organization": first(fleet.get("organization")).get("handle"),
               "__meta_balena_release": release.get("raw_version"), "job": "node", "__meta_balena_exporter": "node"}
    labels = {name: value for name, value in labels.items() if value}
    for owner, tags in (("tag_", device["device_tag"]), ("fleet_tag_", fleet.get("application_tag", []))):
        for tag in tags:
            labels["__meta_balena_" + owner + re.sub("[^a-zA-Z0-9_]", "_", tag["tag_key"])] = tag["value"]
    return {"targets": [device["uuid"] + ".balena:9100"], "labels": labels}

def refresh(path):
    groups = [group(device) for device in devices()]
    with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(path), delete=False) as file:
        json.dump(groups, file, ensure_ascii=False)
        os.fsync(file.fileno())
    os.rename(file.name, path)
    print("updated", len(groups), "targets", flush=True)

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
refresh(os.environ["SD_FILE_PATH"])
while "--oneshot" not in sys.argv:
    signal.sigtimedwait([signal.SIGHUP], 3600)
    refresh(os.environ["SD_FILE_PATH"])
