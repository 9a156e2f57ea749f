// What one would write in an evening: Go with encoding/json.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"
)

const (
	page   = 1000
	fields = "id,uuid,device_name,os_version,os_variant,supervisor_version"
	expand = "is_of__device_type($select=slug),belongs_to__application($select=id,app_name,slug;" +
		"$expand=organization($select=handle),application_tag($select=tag_key,value))," +
		"is_running__release($select=commit,raw_version),device_tag($select=tag_key,value)"
)

type tag struct {
	Key   string `json:"tag_key"`
	Value string
}
type fleet struct {
	ID           uint64
	AppName      string `json:"app_name"`
	Slug         string
	Organization []struct{ Handle string }
	Tags         []tag `json:"application_tag"`
}
type device struct {
	ID                uint64
	UUID              string
	DeviceName        string                  `json:"device_name"`
	OSVersion         string                  `json:"os_version"`
	OSVariant         string                  `json:"os_variant"`
	SupervisorVersion string                  `json:"supervisor_version"`
	DeviceType        []struct{ Slug string } `json:"is_of__device_type"`
	Fleet             []fleet                 `json:"belongs_to__application"`
	Release           []struct {
		Commit  string
		Version string `json:"raw_version"`
	} `json:"is_running__release"`
	Tags []tag `json:"device_tag"`
}
type group struct {
	Targets []string          `json:"targets"`
	Labels  map[string]string `json:"labels"`
}

var illegal = regexp.MustCompile("[^a-zA-Z0-9_]")

// Set by shipped.go.
var publish = func([]device) {}

// All records of devices with these fields, page by page.
func fetch[T any](fields, expand string, id func(*T) uint64) (all []T, err error) {
	for after := uint64(0); ; {
		url := fmt.Sprintf("%s/v7/device?$select=%s&$expand=%s&$filter=(id%%20gt%%20%d)&$orderby=id%%20asc&$top=%d",
			os.Getenv("BALENA_API_URL"), fields, expand, after, page)
		request, err := http.NewRequest("GET", url, nil)
		if err != nil {
			return nil, err
		}
		request.Header.Set("Authorization", "Bearer "+os.Getenv("API_KEY"))
		answer, err := http.DefaultClient.Do(request)
		if err != nil {
			return nil, err
		}
		var body struct{ D []T }
		if answer.StatusCode == 200 {
			err = json.NewDecoder(answer.Body).Decode(&body)
		} else {
			err = fmt.Errorf("the API answers %s", answer.Status)
		}
		io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
		if err != nil {
			return nil, err
		}
		all = append(all, body.D...)
		if len(body.D) < page {
			return all, nil
		}
		after = id(&body.D[page-1])
	}
}

func interval(name string, unset time.Duration) time.Duration {
	if interval, err := time.ParseDuration(os.Getenv(name)); err == nil {
		return interval
	}
	return unset
}

func (d *device) group() group {
	labels := map[string]string{}
	set := func(name, value string) {
		if value != "" {
			labels[name] = value
		}
	}
	tags := func(owner string, tags []tag) {
		for _, tag := range tags {
			labels["__meta_balena_"+owner+illegal.ReplaceAllString(tag.Key, "_")] = tag.Value
		}
	}
	set("device_name", d.DeviceName)
	set("uuid", d.UUID)
	set("os_version", d.OSVersion)
	set("os_variant", d.OSVariant)
	set("supervisor_version", d.SupervisorVersion)
	set("__meta_balena_device_id", strconv.FormatUint(d.ID, 10))
	set("job", "node")
	set("__meta_balena_exporter", "node")
	for _, kind := range d.DeviceType {
		set("device_type", kind.Slug)
	}
	for _, release := range d.Release {
		set("commit", release.Commit)
		set("__meta_balena_release", release.Version)
	}
	tags("tag_", d.Tags)
	for _, fleet := range d.Fleet {
		set("fleet", fleet.Slug)
		set("__meta_balena_fleet_name", fleet.AppName)
		set("__meta_balena_fleet_id", strconv.FormatUint(fleet.ID, 10))
		for _, organization := range fleet.Organization {
			set("__meta_balena_organization", organization.Handle)
		}
		tags("fleet_tag_", fleet.Tags)
	}
	return group{[]string{d.UUID + ".balena:9100"}, labels}
}

func refresh(path string) error {
	devices, err := fetch[device](fields, expand, func(d *device) uint64 { return d.ID })
	if err != nil {
		return err
	}
	groups := []group{}
	for i := range devices {
		groups = append(groups, devices[i].group())
	}
	publish(devices)
	text, err := json.Marshal(groups)
	if err != nil {
		return err
	}
	file, err := os.CreateTemp(filepath.Dir(path), "")
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err = file.Write(text); err == nil {
		err = file.Sync()
	}
	if err == nil {
		err = os.Rename(file.Name(), path)
	}
	fmt.Println("updated", len(groups), "targets")
	return err
}

func main() {
	again := make(chan os.Signal, 1)
	signal.Notify(again, syscall.SIGHUP)
	ticker := time.NewTicker(interval("REFRESH_RATE", time.Hour))
	for {
		if err := refresh(os.Getenv("SD_FILE_PATH")); err != nil {
			log.Fatal(err)
		}
		if len(os.Args) > 1 && os.Args[1] == "--oneshot" {
			return
		}
		select {
		case <-again:
		case <-ticker.C:
		}
	}
}
