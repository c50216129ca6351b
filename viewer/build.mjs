// Bundles the page of `gvsl-zoo view` into gvsl_zoo/view/page, with the licences of all that is in the bundle.
import { build } from 'esbuild'
import { cp, mkdir, readFile, readdir, rm, writeFile } from 'node:fs/promises'

const source = new URL('src/', import.meta.url)
const page = new URL('../gvsl_zoo/view/page/', import.meta.url)

await rm(page, { recursive: true, force: true })
await mkdir(page, { recursive: true })
await build({
  entryPoints: [new URL('app.js', source).pathname],
  outfile: new URL('app.js', page).pathname,
  bundle: true,
  format: 'esm',
  minify: true,
  target: 'es2022',
  legalComments: 'none', // they are in licences.txt
})
for (const name of ['index.html', 'style.css']) await cp(new URL(name, source), new URL(name, page))

const lock = JSON.parse(await readFile(new URL('package-lock.json', import.meta.url), 'utf8'))
const bundled = Object.entries(lock.packages).filter(([path, { dev, optional }]) => path && !dev && !optional)
const notices = await Promise.all(
  bundled.map(async ([path, { version, license }]) => {
    const name = path.replace(/^.*node_modules\//, '')
    return `${name} ${version} (${license})\n\n${(await licenceText(path, name)).trim()}\n`
  }),
)
await writeFile(new URL('licences.txt', page), notices.join(`\n${'-'.repeat(100)}\n\n`))

// The package's own file, or ours where it brings none; a package without either stops the build.
async function licenceText(path, name) {
  const folder = new URL(`${path}/`, import.meta.url)
  const own = (await readdir(folder)).find((file) => /^licen[cs]e/i.test(file))
  const file = own ? new URL(own, folder) : new URL(`licences/${name.replace('/', '-')}.txt`, import.meta.url)
  return readFile(file, 'utf8')
}
