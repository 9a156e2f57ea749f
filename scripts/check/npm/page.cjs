// Opens the page at each size, in light and dark colours, and reports what axe finds and what is wider than the window.
const { readFileSync } = require('fs')
const { chromium } = require('playwright-core')

const [url, folder] = process.argv.slice(2)
const axe = readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8')
const quiet = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync']
const sizes = { wide: [1280, 900], phone: [360, 740], narrow: [320, 568] }

async function check(browser, colorScheme, size) {
    const [width, height] = sizes[size]
    // The policy of the page forbids scripts, also those of axe.
    const context = await browser.newContext({ viewport: { width, height }, colorScheme, bypassCSP: true })
    const page = await context.newPage()
    const problems = []
    page.on('console', (message) => message.type() === 'error' && problems.push(message.text()))
    await page.goto(url)
    await page.screenshot({ path: `${folder}/${colorScheme}-${size}.png`, fullPage: true })
    const needed = await page.evaluate(() => document.documentElement.scrollWidth)
    if (needed > width) problems.push(`it needs ${needed} of ${width} pixels`)
    await page.evaluate(axe)
    const { passes, violations } = await page.evaluate(() => window.axe.run())
    if (passes.length === 0) problems.push('axe checked nothing')
    for (const { id, help, nodes } of violations) problems.push(`${id}: ${help}: ${nodes[0].html}`)
    await context.close()
    return problems.map((problem) => `${colorScheme}, ${size}: ${problem}`)
}

async function main() {
    const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: quiet })
    const problems = []
    let count = 0
    for (const scheme of ['light', 'dark'])
        for (const size of Object.keys(sizes)) {
            problems.push(...(await check(browser, scheme, size)))
            count += 1
        }
    await browser.close()
    for (const problem of problems) console.error(problem)
    if (problems.length > 0) process.exit(1)
    console.log(`${count} views without findings; pictures of the whole page are in ${folder}`)
}

main()
